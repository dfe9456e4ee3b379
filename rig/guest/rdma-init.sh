#!/bin/sh
# First process of the guest in which RDMA is tested. Makes a soft-RoCE device on its network card, runs the program that the
# kernel command line names, and ends QEMU with its exit status:
#   plover.ip=10.77.0.51/24          address of eth0 (required)
#   plover.netem=WORD,WORD,…         what «tc qdisc add dev eth0 root netem» is told (default: nothing is done)
#   plover.run=WORD,WORD,…           arguments of rig-rdma-guest (required)
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run

leave() {
    # The port of isa-debug-exit (0xf4); QEMU exits with twice the value plus one.
    printf "\\x$(printf %02x "$1")" | dd of=/dev/port bs=1 seek=244 conv=notrunc 2>/dev/null
    poweroff -f
}
fail() {
    echo "PLOVER-GUEST-FAILED $*" >/dev/console
    leave 99
}

ip_cidr= netem= run=
for word in $(cat /proc/cmdline); do
    case $word in
    plover.ip=*) ip_cidr=${word#*=} ;;
    plover.netem=*) netem=${word#*=} ;;
    plover.run=*) run=${word#*=} ;;
    esac
done
[ -n "$ip_cidr" ] || fail "no plover.ip= on the kernel command line"
[ -n "$run" ] || fail "no plover.run= on the kernel command line"

for module in $(cat /modules/order); do
    insmod "/modules/$module" || fail "cannot load $module"
done
tries=0
while [ ! -e /sys/class/net/eth0 ]; do
    tries=$((tries + 1))
    [ "$tries" -lt 500 ] || fail "no network card appeared"
    usleep 10000
done
ip link set lo up
ip addr add "$ip_cidr" dev eth0
ip link set eth0 up
rdma link add rxe0 type rxe netdev eth0 || fail "no soft-RoCE device"
# For the rings; the program takes normal pages when these are used up.
echo 8 >/proc/sys/vm/nr_hugepages

IFS=,
if [ -n "$netem" ]; then
    # By its path: busybox would take its own tc, which knows no netem.
    # shellcheck disable=SC2086 # the commas separate arguments
    /bin/tc qdisc add dev eth0 root netem $netem || fail "netem does not take $netem"
fi
# shellcheck disable=SC2086
set -- $run
rig-rdma-guest "$@" >/dev/console 2>&1
status=$?
if [ -n "$netem" ]; then
    /bin/tc -s qdisc show dev eth0 >/dev/console
fi
leave $status
