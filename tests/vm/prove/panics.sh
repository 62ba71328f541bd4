#vm kernels=newest limit=20 verdict=panic
# A test that ends the kernel.
echo 1 >/proc/sys/kernel/sysrq
echo c >/proc/sysrq-trigger
sleep 20
