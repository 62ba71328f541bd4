#vm kernels=newest limit=3 verdict=late
# A test that never ends, and will not hear of it.
trap '' TERM
while :; do sleep 1; done
