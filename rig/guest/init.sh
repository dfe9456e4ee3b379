#!/bin/sh
# First process of every guest of the rig. The kernel command line says what it does:
#   plover.ip=10.77.0.50/24          address of eth0 (required)
#   plover.service=redis             redis | memcached | nginx | lighttpd | postgres | racey (the image must contain it)
#   plover.iperf3=on                 redis only: iperf3 serves beside it, on port 5201
#   plover.on_exit=poweroff          poweroff | reboot | stay: what happens when the service ends
#   plover.racey=THREADS,ROUNDS      racey only; ROUNDS 0 = for ever
# Nothing here sends a frame or wakes the CPU by itself once the guest is ready.
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run

fail() {
    echo "PLOVER-GUEST-FAILED $*" >/dev/console
    poweroff -f
}

ip_cidr= service= iperf3= on_exit=poweroff racey=4,0
for word in $(cat /proc/cmdline); do
    case $word in
    plover.ip=*) ip_cidr=${word#*=} ;;
    plover.service=*) service=${word#*=} ;;
    plover.iperf3=*) iperf3=${word#*=} ;;
    plover.on_exit=*) on_exit=${word#*=} ;;
    plover.racey=*) racey=${word#*=} ;;
    esac
done
[ -n "$ip_cidr" ] || fail "no plover.ip= on the kernel command line"

for module in $(cat /modules/order 2>/dev/null); do
    insmod "/modules/$module" || fail "cannot load $module"
done

# The only network card is eth0, whatever its MAC address is.
tries=0
while [ ! -e /sys/class/net/eth0 ]; do
    tries=$((tries + 1))
    [ "$tries" -lt 500 ] || fail "no network card appeared"
    usleep 10000
done
ip link set lo up
ip addr add "$ip_cidr" dev eth0
ip link set eth0 up
echo 1 >/proc/sys/vm/overcommit_memory

# Before the service, so that it listens by the time the guest is ready.
[ -z "$iperf3" ] || iperf3 --server --version4 >/tmp/iperf3.log 2>&1 &

case $service in
redis)
    redis-server --bind 0.0.0.0 --port 6379 --protected-mode no --save "" --appendonly no --dir /tmp \
        --tcp-keepalive 0 --logfile "" >/tmp/service.log 2>&1 &
    port=18EB ;;
memcached)
    memcached -u root -l 0.0.0.0 -p 11211 -U 0 -m 64 -t 1 >/tmp/service.log 2>&1 &
    port=2BCB ;;
nginx)
    mkdir -p /tmp/nginx
    nginx -p /tmp/nginx -e /tmp/service.log -c /etc/plover-nginx.conf >>/tmp/service.log 2>&1 &
    port=0050 ;;
lighttpd)
    lighttpd -D -f /etc/plover-lighttpd.conf >/tmp/service.log 2>&1 &
    port=0050 ;;
postgres)
    # The image's files belong to root, and PostgreSQL wants to be somebody else and to own its data alone.
    chown -R postgres:postgres /data && chmod -R u=rwX,go= /data || fail "cannot give /data to postgres"
    mkdir -p /dev/shm && mount -t tmpfs shm /dev/shm
    su -s /bin/sh postgres -c "exec postgres -D /data" >/tmp/service.log 2>&1 &
    port=1538 ;;
racey)
    racey "${racey%,*}" "${racey#*,}" /tmp/racey.out >/tmp/service.log 2>&1 &
    port=1B58 ;;
*) fail "plover.service=$service is not known" ;;
esac
pid=$!

# Ready means that the port listens; looking at the kernel's table disturbs nobody.
tries=0
while ! grep -q ":$port 00000000:0000 0A" /proc/net/tcp; do
    tries=$((tries + 1))
    if [ "$tries" -gt 3000 ] || [ ! -d "/proc/$pid" ]; then
        cat /tmp/service.log >/dev/console
        fail "$service did not start to listen"
    fi
    usleep 10000
done
echo "PLOVER-GUEST-READY service=$service ip=$ip_cidr" >/dev/console

wait $pid
echo "PLOVER-GUEST-SERVICE-EXITED status=$?" >/dev/console
case $on_exit in
reboot) reboot -f ;;
stay) while :; do sleep 100000; done ;;
*) poweroff -f ;;
esac
