#!/bin/bash
# ready PORT [PATH]: for health checks. Prints why not; starts no Python for it.
exec 3<>"/dev/tcp/127.0.0.1/$1" || exit 1
printf 'GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n' "${2:-/readyz}" >&3
read -r -t 2 _ status _ <&3
[ "$status" = 200 ] && exit 0
timeout 2 cat <&3
exit 1
