#ifndef SOFTGPU_CONTROL_H
#define SOFTGPU_CONTROL_H

int control_create(void);  /* from <directory>/settings; 0, or -1 after saying why */
void control_status(void); /* the whole host as one JSON object on stdout */

#endif
