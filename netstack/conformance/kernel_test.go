//go:build e2e

package conformance

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ztgate/internal/testwait"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// namespacePrefix starts the name of every namespace that the tests make.
const namespacePrefix = "conformance"

var namespaces atomic.Uint32

// leftBehind matches names with the number of the process that made them.
var leftBehind = regexp.MustCompile(`^(?:` + namespacePrefix + `-|` + labName + `)(\d+)-`)

// leftOvers lists the namespaces of runs that were killed.
func leftOvers() (names []string) {
	entries, _ := os.ReadDir("/run/netns") // without it there are none
	for _, e := range entries {
		m := leftBehind.FindStringSubmatch(e.Name())
		if m == nil {
			continue
		}
		if pid, err := strconv.Atoi(m[1]); err == nil && errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			names = append(names, e.Name())
		}
	}
	return names
}

// cleanUp removes the namespaces that killed runs left, once. Another run may be
// doing the same.
var cleanUp = sync.OnceFunc(func() {
	for _, name := range leftOvers() {
		if strings.HasPrefix(name, namespacePrefix) {
			_ = run("ip", "netns", "del", name)
		}
	}
})

// namespace is a network namespace of a test.
type namespace struct{ name string }

// newNamespace makes a namespace that goes away with the test.
func newNamespace(t *testing.T, role string) *namespace {
	t.Helper()
	cleanUp()
	n := &namespace{fmt.Sprintf("%s-%d-%d%s", namespacePrefix, os.Getpid(), namespaces.Add(1), role)}
	if err := run("ip", "netns", "add", n.name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := run("ip", "netns", "del", n.name); err != nil {
			t.Error(err)
		}
	})
	return n
}

func run(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// sh runs a script inside.
func (n *namespace) sh(script string) error {
	return run("ip", "netns", "exec", n.name, "sh", "-ec", script)
}

// do runs f on a thread inside; what it opens stays there.
func (n *namespace) do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		ns, err := netns.GetFromName(n.name)
		if err == nil {
			defer ns.Close()
			if err = netns.Set(ns); err == nil {
				err = f()
			}
		}
		done <- err
	}()
	return <-done
}

// tap is a packet socket on one interface.
type tap struct {
	fd    int
	index int

	mu     sync.Mutex
	frames [][]byte
	done   chan struct{}
}

func (n *namespace) tap(name string) (*tap, error) {
	t := &tap{done: make(chan struct{})}
	err := n.do(func() error {
		ifi, err := net.InterfaceByName(name)
		if err != nil {
			return err
		}
		t.index = ifi.Index
		all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
		if t.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all)); err != nil {
			return err
		}
		_ = unix.SetsockoptInt(t.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20)
		const ignoreOutgoing = 23
		if err := unix.SetsockoptInt(t.fd, unix.SOL_PACKET, ignoreOutgoing, 1); err != nil {
			return err
		}
		if err := unix.SetsockoptTimeval(t.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}); err != nil {
			return err
		}
		return unix.Bind(t.fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifi.Index})
	})
	return t, err
}

// read collects frames until the tap is closed.
func (t *tap) read(stop <-chan struct{}) {
	defer close(t.done)
	buf := make([]byte, 1<<16)
	for {
		n, err := unix.Read(t.fd, buf)
		select {
		case <-stop:
			return
		default:
		}
		if err != nil || n < ethernetLen {
			continue
		}
		t.mu.Lock()
		t.frames = append(t.frames, append([]byte(nil), buf[:n]...))
		t.mu.Unlock()
	}
}

func (t *tap) send(frame []byte) error {
	if len(frame) > 1514+1500 {
		return fmt.Errorf("frame of %d bytes", len(frame))
	}
	return unix.Sendto(t.fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: t.index, Halen: 6})
}

// kernelRouter is the kernel of a namespace with nftables masquerade: the control.
type kernelRouter struct {
	t      *testing.T
	ns     *namespace
	taps   [2]*tap
	stop   chan struct{}
	seq    uint16
	waited time.Duration
}

// patience is how long a row may really wait on the kernel's clock.
const patience = 40 * time.Second

var overlayBarrier = netip.MustParseAddr("10.77.100.250")

func newKernelRouter(t *testing.T, s setup) router {
	if s.prefix6.IsValid() {
		panic(notHere("not part of the control"))
	}
	r := &kernelRouter{t: t, ns: newNamespace(t, "r"), stop: make(chan struct{})}
	players := newNamespace(t, "p")
	script := fmt.Sprintf(`
ip link add lan type veth peer name v0 netns %[1]s
ip link add wan type veth peer name o0 netns %[1]s
sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0
sysctl -qw net.ipv6.conf.lan.accept_dad=0 net.ipv6.conf.wan.accept_dad=0
sysctl -qw net.ipv4.conf.lan.rp_filter=0 net.ipv4.conf.wan.rp_filter=0 net.ipv4.icmp_ratelimit=1000
ip link set lan address %[2]x:%[3]x:0:0:0:1; ip link set wan address %[2]x:%[3]x:0:0:0:1
ethtool -K lan tx off rx off tso off gso off gro off >/dev/null; ethtool -K wan tx off rx off tso off gso off gro off >/dev/null
ip link set lan mtu %[4]d; ip link set wan mtu %[5]d
ip link set lo up; ip link set lan up; ip link set wan up
ip addr add 10.77.1.1/24 dev lan; ip route add 10.77.2.0/24 dev lan; ip addr add 10.77.100.1/24 dev wan
ip addr add fd77:1::1/64 dev lan nodad; ip route add fd77:2::/64 dev lan; ip addr add fd77:100::1/64 dev wan nodad
ip route add 10.77.200.0/24 via 10.77.100.2; ip route add prohibit 10.77.201.0/24
ip route add fd77:200::/64 via fd77:100::2
`, players.name, routerMAC[0], routerMAC[1], s.vpcMTU, s.network.MTU)
	for _, a := range []netip.Addr{barrierHost, v1, v2, v16, v26, overlayBarrier} {
		dev := "lan"
		if a == overlayBarrier {
			dev = "wan"
		}
		script += fmt.Sprintf("ip neigh add %s lladdr %s dev %s\n", a, net.HardwareAddr(macOf(a)), dev)
	}
	script += "nft -f - <<'E'\n" + ruleset(s) + "E\n"
	if err := r.ns.sh(script); err != nil {
		t.Fatal(err)
	}
	if err := players.sh(`sysctl -qw net.ipv6.conf.all.disable_ipv6=1
for i in v0 o0; do ethtool -K $i tx off rx off tso off gso off gro off >/dev/null; ip link set $i mtu 9100; ip link set $i up; done`); err != nil {
		t.Fatal(err)
	}
	for s, name := range []string{"v0", "o0"} {
		x, err := players.tap(name)
		if err != nil {
			t.Fatal(err)
		}
		r.taps[s] = x
		go x.read(r.stop)
	}
	return r
}

func macOf(a netip.Addr) []byte { m := playerMAC(a); return m[:] }

// ruleset is what people who use masquerade have, with the forwards and limits of a
// row: what belongs to no connection is dropped.
func ruleset(s setup) string {
	var fwd, clamp string
	for _, f := range s.forwards {
		proto := map[uint8]string{protoTCP: "tcp", protoUDP: "udp"}[f.proto]
		fwd += fmt.Sprintf("ip daddr %s %s dport %d dnat to %s\n", f.port.Addr(), proto, f.port.Port(), f.to)
	}
	if s.network.MTU != 1500 {
		clamp = "tcp flags syn tcp option maxseg size set rt mtu\n"
	}
	masq := ""
	if s.network.Masquerade {
		masq = "oifname \"wan\" masquerade\n"
	}
	return `table ip nat {
chain pre { type nat hook prerouting priority dstnat;
` + fwd + `}
chain post { type nat hook postrouting priority srcnat;
` + masq + `iifname "lan" oifname "lan" ct status dnat masquerade
}
}
table inet filter { chain forward { type filter hook forward priority filter; policy drop;
` + clamp + `ct state invalid counter drop
ct state established,related accept
iifname "lan" accept
ct status dnat accept
meta nfproto ipv6 icmpv6 type echo-request accept
counter drop
}
}
`
}

func (r *kernelRouter) name() string { return "kernel" }

func (r *kernelRouter) close() error {
	close(r.stop)
	for _, x := range r.taps {
		<-x.done
		_ = unix.Close(x.fd)
	}
	return nil
}

func (r *kernelRouter) inject(s side, frames [][]byte) {
	for i, f := range frames {
		if i%256 == 255 { // the kernel's backlog is short
			r.settle()
		}
		if s == vpc { // the TUN of the engine has no link header: here it has
			copy(f[:6], routerMAC[:])
		}
		if err := r.taps[s].send(f); err != nil {
			r.t.Logf("send %d bytes: %v", len(f), err)
		}
	}
}

func (r *kernelRouter) take(s side) [][]byte {
	x := r.taps[s]
	x.mu.Lock()
	defer x.mu.Unlock()
	out := x.frames
	x.frames = nil
	return out
}

// settle pings the router from both sides.
func (r *kernelRouter) settle() {
	r.seq++
	for s, c := range []struct{ host, to netip.Addr }{{barrierHost, rv}, {overlayBarrier, ro}} {
		p := ping(c.host, c.to, barrierID, r.seq, "")
		r.inject(side(s), [][]byte{append(ethernet(routerMAC, playerMAC(c.host), 0x0800), p...)})
	}
	for s, host := range []netip.Addr{barrierHost, overlayBarrier} {
		testwait.Poll(5*time.Second, func() bool { return r.taps[s].passed(host, r.seq) })
	}
}

func (t *tap) passed(host netip.Addr, seq uint16) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, f := range t.frames {
		if len(f) < ethernetLen+28 || binary.BigEndian.Uint16(f[12:]) != 0x0800 {
			continue
		}
		if p := parse(f[ethernetLen:]); p.dst == host && p.typ == 0 && p.seq == seq {
			t.frames = append(t.frames[:i:i], t.frames[i+1:]...)
			return true
		}
	}
	return false
}

func (r *kernelRouter) advance(d time.Duration) error {
	if r.waited += d; r.waited > patience {
		return fmt.Errorf("takes %v of the kernel's real time", d)
	}
	time.Sleep(d)
	return nil
}

func (r *kernelRouter) accounted() map[string]float64 { return nil }
func (r *kernelRouter) waitGone(uint16) error         { return nil }

func (r *kernelRouter) flush() {
	if err := r.ns.sh("conntrack -F >/dev/null 2>&1"); err != nil {
		r.t.Fatal(err)
	}
}

// linuxFails are the rows that the kernel fails, as far as they run on it here, and
// how; docs/nat.md marks them.
var linuxFails = map[string]string{
	"4787-REQ-1": "the mapping depends on the destination after a collision", "4787-REQ-3": "ports are shared",
	"6888-REQ-1": "as 4787-REQ-1", "5382-REQ-1": "as UDP", "5382-REQ-7": "ports are shared",
	"5508-REQ-2": "30 s", "L-OTHER-TIMERS": "ICMP 30 s", "7857-S2.2": "gone 10 s after a RST", "L-TCP-TIMERS": "as 7857-S2.2",
	"4787-REQ-9": "no dynamic hairpin", "4787-REQ-9a": "no dynamic hairpin", "5508-REQ-7": "no dynamic hairpin", "5508-REQ-7a": "no dynamic hairpin",
	"5382-REQ-4": "RST at once", "5382-REQ-4a": "RST at once", "5382-REQ-4s": "RST at once", "L-TCP-INMID": "RST", "L-LOSS-IN": "RST", "5382-REQ-3": "RST by the router itself",
	"7857-S6": "RST by the router itself", "7857-S11": "same IDs", "4787-REQ-14a": "fragment store starves",
	"L-FWD-SHADOW": "V2 gets the forwarded port", "L-LOSS-FWD": "leaves as Ro:90", "L-LOSS-COLLIDED": "ports swapped",
	"5508-REQ-10c": "source quench passes",
	"1812-5.3.7s":  "240/4 and others forwarded", "1812-5.3.7d": "forwarded by the default route",
	"1812-5.3.7o": "land packet of a third host forwarded", "1812-5.3.8": "spoofed sources forwarded", "3704-v6": "spoofed sources forwarded",
	"4291": "v4-mapped forwarded", "1812-4.3.2.7d": "11/0 to the subnet broadcast", "5508-REQ-10e": "as 1812-4.3.2.7d",
	"1812-5.3.13.5": "timestamp shows the inside address", "1812-4.3.2.4": "host unreachable from Ro",
	"1812-4.3.2.8": "six errors, then one a second", "5508-REQ-10f": "as 1812-4.3.2.8", "L-TRACE-MTR": "rate limit",
	"4007": "comes back on the link, with a redirect", "4890": "listener messages forwarded",
	"8200-4.7": "dropped by the invalid rule", "L-TCP-OOW": "RST by the router itself, as its input accepts",
	"L-WG":  "a refused packet from outside takes the port",
	"L-GRE": "address only", "L-ESP": "address only", "L-IPIP": "address only", "L-PROTO": "address only",
	"L-DCCP": "address only", "L-PPTP": "address only",
}

// TestLinux runs the rows on the kernel's nftables masquerade and compares with
// what the document says about it.
func TestLinux(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("needs root for network namespaces")
	}
	for _, q := range requirements {
		t.Run(testName(q), func(t *testing.T) {
			t.Parallel()
			v, evidence := runRow(t, q, newKernelRouter)
			reason, failing := linuxFails[q.id]
			switch {
			case v == fails && failing:
				evidence = "as documented (" + reason + "): " + evidence
			case v == green && failing:
				evidence = "the document saw it fail (" + reason + "): " + evidence
			case v == fails:
				evidence = "the document saw it pass: " + evidence
			}
			kernels.add(q, v, evidence)
			if (v == fails) != failing && (v == fails || v == green) {
				t.Errorf("%s: %s", v, evidence)
			}
		})
	}
}
