#!/bin/sh
# Installs the Debian packages that the end-to-end tests and benchmarks use.
# Does nothing when all programs are there.
set -eu
missing=
need() { command -v "$1" >/dev/null 2>&1 || missing="$missing $2"; }
need ip iproute2
need ping iputils-ping
need curl curl
need iperf3 iperf3
need nft nftables
need traceroute traceroute
need mtr mtr-tiny
need hping3 hping3
need nmap nmap
need dig dnsutils
need dnsmasq dnsmasq-base
need sipp sip-tester
need tracepath iputils-tracepath
need conntrack conntrack
need ethtool ethtool
need miniupnpd miniupnpd-nftables
need nginx nginx
need haproxy haproxy
need postfix postfix
need swaks swaks
perl -MIO::Socket::INET6 -e 1 2>/dev/null || missing="$missing libio-socket-inet6-perl" # swaks sends by IPv6 with it
[ -e /usr/lib/nginx/modules/ngx_stream_module.so ] || missing="$missing libnginx-mod-stream"
need gcc gcc # the race detector links with it
need qemu-aarch64-static qemu-user-static # runs the tests of another architecture
[ -z "$missing" ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
	echo "missing programs: install the packages$missing" >&2
	exit 1
fi
export DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d # the servers among them are for tests to start, in namespaces
if [ ! -e "$policy" ]; then
	trap 'rm -f "$policy"' EXIT
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 755 "$policy"
fi
apt-get update -q
# shellcheck disable=SC2086 # a list of package names
apt-get install -q -y --no-install-recommends $missing
