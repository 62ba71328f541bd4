#vm kernels=newest,6.12 limit=1800
# What the mount suite demands of a mounted disk.
# The skipped test looks for a dead process's number, and nobody reaps here.
export PLOOP_TREE_MIB=24 PLOOP_WORKER_KILLS=6
"$PLOOP_SUITES/mount" --test-threads 2 --show-output --skip a_killed_keeper_is_cleaned_up_after_by_the_next_command
