"""A stand-in of NVIDIA's MPS control program, ``nvidia-cuda-mps-control``, over the software GPU's state."""
