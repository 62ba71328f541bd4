#vm kernels=newest limit=10 verdict=failed
# A test that fails.
exit 7
