#vm kernels=newest limit=5 verdict=stopped
# A test that takes away whoever watches over its limit.
kill -STOP "$(ps -o ppid= -p $PPID)" $PPID
sleep 1000
