#!/bin/sh
# First process of the guest in which the SPDK engine is tested. Gives every NVMe controller to vfio-pci, runs the program that the
# kernel command line names, and ends QEMU with its exit status:
#   plover.run=WORD,WORD,…           arguments of rig-nvme-guest (required)
#   plover.hugepages=N               pages of 2 MiB (default 24, as docs/spdk.md recommends)
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
# SPDK's locks on devices.
mount -t tmpfs tmp /var/tmp

leave() {
    # The port of isa-debug-exit (0xf4); QEMU exits with twice the value plus one.
    printf "\\x$(printf %02x "$1")" | dd of=/dev/port bs=1 seek=244 conv=notrunc 2>/dev/null
    poweroff -f
}
fail() {
    echo "PLOVER-GUEST-FAILED $*" >/dev/console
    leave 99
}

run= hugepages=24
for word in $(cat /proc/cmdline); do
    case $word in
    plover.run=*) run=${word#*=} ;;
    plover.hugepages=*) hugepages=${word#*=} ;;
    esac
done
[ -n "$run" ] || fail "no plover.run= on the kernel command line"

for module in $(cat /modules/order); do
    insmod "/modules/$module" || fail "cannot load $module"
done
echo "$hugepages" >/proc/sys/vm/nr_hugepages
for device in /sys/bus/pci/devices/*; do
    [ "$(cat "$device/class")" = 0x010802 ] || continue
    echo vfio-pci >"$device/driver_override"
    echo "${device##*/}" >/sys/bus/pci/drivers_probe
    [ -e "$device/driver" ] || fail "vfio-pci does not take ${device##*/}"
done

IFS=,
# shellcheck disable=SC2086 # the commas separate arguments
set -- $run
rig-nvme-guest "$@" >/dev/console 2>&1
leave $?
