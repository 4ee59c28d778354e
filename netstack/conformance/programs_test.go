//go:build e2e

package conformance

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"

	"ztgate/internal/testwait"
	"ztgate/netstack"
)

// Addresses of the real hosts: clients behind a kernel router in front of the
// engine's TUN, M behind the overlay and H behind M.
const (
	hostV1, hostV2  = "10.77.1.2", "10.77.2.2"
	hostV16         = "fd77:1::2"
	gatewayV        = "10.77.9.2" // the engine on the VPC side
	gatewayV6       = "fd77:9::2"
	gatewayO        = "10.77.100.1"
	hostM, hostH    = "10.77.100.2", "10.77.200.2"
	hostM6, hostH6  = "fd77:100::2", "fd77:200::2"
	kernelV         = "10.77.1.1" // the first hop of V1
	bulk            = 20 << 20
	overlayMTU      = 1500
	narrowMTU       = 1400 // between M and H, for path MTU discovery
	programPatience = 40 * time.Second
)

// world is the real hosts and an engine between them.
type world struct {
	t               *testing.T
	c1, c2, k, m, s *namespace
	mu              sync.RWMutex // guards engine
	engine          *netstack.Engine
	stopEngine      func()
	tap             *tapPort
	page            []byte
}

// tapPort is the overlay: a TAP in M's namespace.
type tapPort struct {
	f   *os.File
	mu  sync.Mutex
	bad []string // leaks
}

// WriteFrames implements [netstack.Overlay].
func (p *tapPort) WriteFrames(_ uint64, bufs [][]byte, sizes []int, offset int) (int, error) {
	for i, b := range bufs {
		f := b[offset : offset+sizes[i]]
		p.watch(f)
		if _, err := p.f.Write(f); err != nil {
			return i, err
		}
	}
	return len(bufs), nil
}

// watch looks for packets that show an inside address.
func (p *tapPort) watch(f []byte) {
	if len(f) < ethernetLen+20 || binary.BigEndian.Uint16(f[12:]) != 0x0800 {
		return
	}
	if err := leak(parse(f[ethernetLen:])); err != nil {
		p.mu.Lock()
		p.bad = append(p.bad, err.Error())
		p.mu.Unlock()
	}
}

func openTAP(n *namespace, name string) (*os.File, error) {
	var f *os.File
	err := n.do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		req, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			return err
		}
		f = os.NewFile(uintptr(fd), name)
		return nil
	})
	return f, err
}

// newWorld builds everything; it goes away with the test.
func newWorld(t *testing.T) *world {
	w := &world{t: t, c1: newNamespace(t, "c1"), c2: newNamespace(t, "c2"), k: newNamespace(t, "k"), m: newNamespace(t, "m"), s: newNamespace(t, "s")}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var dev tun.Device
	must(w.k.do(func() (err error) { dev, err = tun.CreateTUN("zt", overlayMTU); return err }))
	f, err := openTAP(w.m, "mup")
	must(err)
	w.tap = &tapPort{f: f}
	must(w.k.sh(fmt.Sprintf("c1=%s; c2=%s", w.c1.name, w.c2.name) + `
sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv6.conf.default.accept_dad=0 net.ipv4.icmp_ratelimit=0 net.ipv4.icmp_msgs_per_sec=100000
for i in 1 2; do
ip link add lan$i type veth peer name eth0 netns $(eval echo \$c$i)
ip addr add 10.77.$i.1/24 dev lan$i; ip addr add fd77:$i::1/64 dev lan$i nodad; ip link set lan$i up
done
ip link set lo up
` + tunScript))
	for i, n := range []*namespace{w.c1, w.c2} {
		must(n.sh(fmt.Sprintf(`sysctl -qw net.ipv6.conf.default.accept_dad=0; ip link set lo up; ip addr add 10.77.%[1]d.2/24 dev eth0; ip addr add fd77:%[1]d::2/64 dev eth0 nodad
ip link set eth0 up; ip route add default via 10.77.%[1]d.1; ip -6 route add default via fd77:%[1]d::1`, i+1)))
	}
	must(w.m.sh(fmt.Sprintf(`
sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.icmp_ratelimit=0 net.ipv6.conf.default.accept_dad=0 net.ipv4.icmp_msgs_per_sec=100000
ip link add mdn type veth peer name eth0 netns %[1]s; ip link set lo up; ip link set mup mtu %[2]d; ip link set mup up; ip link set mdn up
ip addr add 10.77.100.2/24 dev mup; ip addr add 10.77.200.1/24 dev mdn; ip addr add fd77:100::2/64 dev mup nodad; ip addr add fd77:200::1/64 dev mdn nodad
ip route add blackhole 10.77.1.0/24; ip route add blackhole 10.77.2.0/24
ip -6 route add fd77:1::/64 via fd77:100::1; ip -6 route add fd77:2::/64 via fd77:100::1`, w.s.name, overlayMTU)))
	must(w.s.sh(`sysctl -qw net.ipv6.conf.default.accept_dad=0 net.ipv4.icmp_ratelimit=0 net.ipv4.icmp_msgs_per_sec=100000; ip link set lo up; ip addr add 10.77.200.2/24 dev eth0; ip addr add 10.77.200.3/24 dev eth0; ip addr add fd77:200::2/64 dev eth0 nodad
ip link set eth0 up; ip route add default via 10.77.200.1; ip -6 route add default via fd77:200::1`))

	must(w.startEngine(dev))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.readTAP(ctx) }()
	t.Cleanup(func() {
		cancel()
		_ = w.tap.f.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
		w.stopEngine()
		w.tap.mu.Lock()
		defer w.tap.mu.Unlock()
		for _, l := range w.tap.bad {
			t.Errorf("LEAK on the overlay: %s", l)
		}
	})
	w.serve()
	return w
}

// startEngine makes an engine on a TUN and lets it run.
func (w *world) startEngine(dev tun.Device) error {
	e, err := netstack.New(netstack.Config{Device: dev, Overlay: w.tap, VPC: netstack.VPC{
		MTU:       overlayMTU,
		Addresses: []netip.Prefix{prefix(gatewayV + "/30"), prefix(gatewayV6 + "/64")},
		Sources:   append([]netip.Prefix{prefix("10.77.9.0/30"), prefix("fd77:9::/64")}, vpcPrefixes...)},
		Forwards: []netstack.PortForward{
			{From: netstack.OverlaySide, Proto: protoTCP, Listen: netip.MustParseAddrPort(gatewayO + ":8080"), To: netip.MustParseAddrPort(hostV1 + ":80")},
			{Proto: protoTCP, Listen: netip.MustParseAddrPort(gatewayV + ":8088"), To: netip.MustParseAddrPort(hostV1 + ":80")},
		}})
	if err != nil {
		return err
	}
	network := defaultSetup().network
	network.MTU = overlayMTU
	if err := e.SetNetworks([]netstack.Network{network}); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.engine = e
	w.stopEngine = func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("engine: %v", err)
		}
	}
	return nil
}

const tunScript = `ip addr add 10.77.9.1/30 dev zt; ip addr add fd77:9::1/64 dev zt nodad; ip link set zt up
ip route add 10.77.100.0/24 dev zt; ip route add 10.77.200.0/24 dev zt; ip route add fd77:100::/64 dev zt; ip route add fd77:200::/64 dev zt
`

// restartEngine stops the engine, whose TUN vanishes with it, and starts another
// one that knows nothing.
func (w *world) restartEngine() error {
	if err := w.k.sh("ip route add blackhole 10.77.200.0/24 metric 1000"); err != nil { // the host doesn't answer in its place
		return err
	}
	w.stopEngine()
	var dev tun.Device
	if err := w.k.do(func() (err error) { dev, err = tun.CreateTUN("zt", overlayMTU); return err }); err != nil {
		return err
	}
	if err := w.startEngine(dev); err != nil {
		return err
	}
	return w.k.sh(tunScript)
}

func (w *world) readTAP(ctx context.Context) error {
	buf := make([]byte, 1<<16)
	for {
		n, err := w.tap.f.Read(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the TAP: %w", err)
		}
		w.mu.RLock()
		e := w.engine
		w.mu.RUnlock()
		e.Deliver(networkID, [][]byte{buf[:n:n]})
	}
}

// serve starts the servers: web pages at H and V1, a DNS responder and an echo
// server at H.
func (w *world) serve() {
	w.page = make([]byte, bulk)
	for i := range w.page {
		w.page[i] = byte(i * 2654435761 >> 13)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/ip", func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, r.RemoteAddr) })
	mux.HandleFunc("/blob", func(rw http.ResponseWriter, _ *http.Request) { _, _ = rw.Write(w.page) })
	mux.HandleFunc("/put", func(rw http.ResponseWriter, r *http.Request) {
		h := sha256.New()
		_, _ = io.Copy(h, r.Body)
		fmt.Fprintf(rw, "%x", h.Sum(nil))
	})
	web := func(n *namespace, address string) {
		var l net.Listener
		if err := n.do(func() (err error) { l, err = net.Listen("tcp", address); return err }); err != nil {
			w.t.Fatal(err)
		}
		s := &http.Server{Handler: mux}
		done := make(chan struct{})
		go func() { defer close(done); _ = s.Serve(l) }()
		w.t.Cleanup(func() { _ = s.Close(); <-done })
	}
	web(w.s, ":80")
	web(w.c1, ":80")
	w.datagrams(53, func(b []byte) []byte {
		if len(b) < 12 {
			return nil
		}
		b[2], b[3] = 0x81, 0x80
		return b
	})
	w.datagrams(7, func(b []byte) []byte { return b })
	var l net.Listener
	if err := w.s.do(func() (err error) { l, err = net.Listen("tcp", ":7"); return err }); err != nil {
		w.t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); _ = c.Close() }()
		}
	}()
	w.t.Cleanup(func() { _ = l.Close() })
}

// datagrams answers UDP at H.
func (w *world) datagrams(port int, answer func([]byte) []byte) {
	var c net.PacketConn
	if err := w.s.do(func() (err error) { c, err = net.ListenPacket("udp4", fmt.Sprintf("%s:%d", hostH, port)); return err }); err != nil {
		w.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			if b := answer(buf[:n]); b != nil {
				_, _ = c.WriteTo(b, from)
			}
		}
	}()
	w.t.Cleanup(func() { _ = c.Close(); <-done })
}

// run runs a program on a host and returns what it prints.
func (w *world) run(n *namespace, args ...string) (string, error) {
	return runIn(n.name, w.t.TempDir(), args...)
}

// listening waits for a server on H; kind is the option of ss for its protocol.
func (w *world) listening(kind string, port int) {
	testwait.Poll(5*time.Second, func() bool {
		out, _ := w.run(w.s, "ss", "-Hln", kind, "sport", "=", fmt.Sprintf(":%d", port))
		return out != ""
	})
}

func runIn(namespace, dir string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), programPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", namespace}, args...)...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, tail(string(out)))
	}
	return string(out), err
}

func tail(s string) string {
	s = strings.TrimSpace(s)
	if len(s) > 300 {
		s = "..." + s[len(s)-300:]
	}
	return strings.ReplaceAll(s, "\n", " | ")
}

// program is one row shown by a real program.
type program struct {
	row  string
	need string // program; "" = none
	run  func(w *world) (evidence string, err error)
}

var hopLine = regexp.MustCompile(`(?m)^\s*\d+\s+(\S+)`)

// hops runs a traceroute and compares its path.
func hops(w *world, n *namespace, args []string, want ...string) (string, error) {
	out, err := w.run(n, args...)
	if err != nil {
		return "", err
	}
	var got []string
	for _, m := range hopLine.FindAllStringSubmatch(out, -1) {
		got = append(got, m[1])
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		return "", fmt.Errorf("%s: hops %v, want %v", strings.Join(args, " "), got, want)
	}
	return fmt.Sprintf("%s: %s", args[0], strings.Join(got, ", ")), nil
}

func path4(extra ...string) []string { return append([]string{kernelV, gatewayV, hostM}, extra...) }

// expect runs a program and wants a text in what it prints.
func expect(w *world, n *namespace, text string, args ...string) (string, error) {
	out, err := w.run(n, args...)
	if err != nil {
		return "", err
	}
	if !regexp.MustCompile(text).MatchString(out) {
		return "", fmt.Errorf("%s: no %q in: %s", strings.Join(args, " "), text, tail(out))
	}
	return args[0] + ": " + regexp.MustCompile(text).FindString(out), nil
}

// pathPrograms: ping, traceroute and mtr.
func pathPrograms() []program {
	return []program{
		{"L-PING-ID", "ping", func(w *world) (string, error) {
			type res struct{ err error }
			ch := make(chan res, 2)
			for _, n := range []*namespace{w.c1, w.c2} {
				go func() {
					_, err := expect(w, n, `10 received`, "ping", "-q", "-c", "10", "-i", "0.1", "-e", "77", hostH)
					ch <- res{err}
				}()
			}
			for range 2 {
				if r := <-ch; r.err != nil {
					return "", r.err
				}
			}
			return "two pings -e 77 at once: 10 of 10 each", nil
		}},
		{"L-PING-BIG", "ping", func(w *world) (string, error) {
			for _, n := range []string{"4000", "65507"} {
				if _, err := expect(w, w.c1, `3 received`, "ping", "-q", "-c", "3", "-i", "0.2", "-s", n, hostH); err != nil {
					return "", err
				}
			}
			return "ping -s 4000 and -s 65507: no loss", nil
		}},
		{"792-b", "ping", func(w *world) (string, error) {
			for _, n := range []string{"0", "1", "63", "64", "1399", "1471", "1472", "1473"} {
				if _, err := expect(w, w.c1, `1 received`, "ping", "-q", "-c", "1", "-s", n, "-p", "5aa5", hostH); err != nil {
					return "", err
				}
			}
			return "ping -s 0 to 1473", nil
		}},
		{"L-TRACE-UDP", "traceroute", func(w *world) (string, error) {
			return hops(w, w.c1, []string{"traceroute", "-n", "-q1", "-w2", hostH}, path4(hostH)...)
		}},
		{"L-TRACE-ICMP", "traceroute", func(w *world) (string, error) {
			return hops(w, w.c1, []string{"traceroute", "-I", "-n", "-q1", "-w2", hostH}, path4(hostH)...)
		}},
		{"L-TRACE-TCP", "traceroute", func(w *world) (string, error) {
			return hops(w, w.c1, []string{"traceroute", "-T", "-p", "22", "-n", "-q1", "-w2", hostH}, path4(hostH)...)
		}},
		{"L-TRACE-IN", "traceroute", func(w *world) (string, error) {
			return hops(w, w.s, []string{"traceroute", "-T", "-p", "8080", "-n", "-q1", "-w2", gatewayO}, "10.77.200.1", gatewayO, gatewayO, gatewayO)
		}},
		{"L-TRACE-6", "traceroute", func(w *world) (string, error) {
			for _, how := range [][]string{nil, {"-I"}, {"-T", "-p", "80"}} {
				args := append(append([]string{"traceroute", "-6", "-n", "-q1", "-w2"}, how...), hostH6)
				if _, err := hops(w, w.c1, args, "fd77:1::1", gatewayV6, hostM6, hostH6); err != nil {
					return "", err
				}
			}
			return "traceroute -6 by UDP, ICMP and TCP: four hops", nil
		}},
		{"L-TRACE-MTR", "mtr", func(w *world) (string, error) {
			for _, how := range [][]string{nil, {"-u"}, {"-T", "-P", "80"}} {
				args := append(append([]string{"mtr", "-n", "--json", "-c", "10", "-i", "0.2"}, how...), hostH)
				out, err := w.run(w.c1, args...)
				if err != nil {
					return "", err
				}
				var r struct {
					Report struct {
						Hubs []struct {
							Host string  `json:"host"`
							Loss float64 `json:"Loss%"`
						} `json:"hubs"`
					} `json:"report"`
				}
				if err := json.Unmarshal([]byte(out), &r); err != nil {
					return "", fmt.Errorf("mtr: %w: %s", err, tail(out))
				}
				if len(r.Report.Hubs) < 4 {
					return "", fmt.Errorf("mtr %v: %d hops", how, len(r.Report.Hubs))
				}
				for _, h := range r.Report.Hubs {
					if h.Loss != 0 && h.Host != kernelV {
						return "", fmt.Errorf("mtr %v: %v %% lost at %s", how, h.Loss, h.Host)
					}
				}
			}
			return "mtr by ICMP, UDP, TCP: 0 % lost at every hop", nil
		}},
		{"L-PMTUD-OUT", "tracepath", func(w *world) (string, error) {
			if err := w.m.sh(fmt.Sprintf("ip link set mdn mtu %d", narrowMTU)); err != nil {
				return "", err
			}
			defer func() { _ = w.m.sh("ip link set mdn mtu 1500") }()
			if err := w.s.sh(fmt.Sprintf("ip link set eth0 mtu %d", narrowMTU)); err != nil {
				return "", err
			}
			defer func() { _ = w.s.sh("ip link set eth0 mtu 1500") }()
			if _, err := expect(w, w.c1, `(?i)mtu ?= ?1400`, "sh", "-c", "ping -M do -c 2 -i 0.3 -W 1 -s 1472 "+hostH+" 2>&1 || true"); err != nil {
				return "", err
			}
			return expect(w, w.c1, `pmtu 1400 hops \d+`, "tracepath", "-n", hostH)
		}},
	}
}

// probePrograms: hping3 and nmap.
func probePrograms() []program {
	return []program{
		{"1812-5.2.7.1", "hping3", func(w *world) (string, error) {
			if _, err := expect(w, w.c1, `(?i)port unreachable`, "sh", "-c", "ping -c1 -W2 "+gatewayV+" >/dev/null; hping3 -2 -p 5999 -c 1 "+gatewayV+" 2>&1 || true"); err != nil {
				return "", err
			}
			return expect(w, w.c1, `flags=SA`, "hping3", "-S", "-p", "80", "-s", "4100", "-k", "-c", "1", hostH)
		}},
		{"5508-REQ-1", "hping3", func(w *world) (string, error) {
			return expect(w, w.c1, `ICMP timestamp`, "hping3", "--icmp", "--icmp-ts", "-c", "1", hostH)
		}},
		{"L-TCP-FLAGS", "nmap", func(w *world) (string, error) {
			return expect(w, w.c1, `(?s)22/tcp +closed.*80/tcp +open`, "nmap", "-n", "-Pn", "-sS", "-p", "22,80", "--reason", hostH)
		}},
		{"5382-REQ-4", "nmap", func(w *world) (string, error) {
			return expect(w, w.s, `(?s)21/tcp +filtered.*8080/tcp +open`, "nmap", "-n", "-Pn", "-sS", "-p", "21,8080", "--max-retries", "1", gatewayO)
		}},
	}
}

// transferPrograms: what moves data.
func transferPrograms() []program {
	return []program{
		{"L-PORT", "curl", func(w *world) (string, error) {
			return expect(w, w.c1, regexp.QuoteMeta(gatewayO+":40000"), "curl", "-s", "-m", "5", "--local-port", "40000", "http://"+hostH+"/ip")
		}},
		{"L-PORT-SHARED", "curl", func(w *world) (string, error) {
			var got []string
			for _, n := range []*namespace{w.c1, w.c2} {
				out, err := w.run(n, "curl", "-s", "-m", "5", "--local-port", "40077", "http://"+hostH+"/ip")
				if err != nil {
					return "", err
				}
				got = append(got, out)
			}
			if got[0] == got[1] {
				return "", fmt.Errorf("both are %s", got[0])
			}
			return "curl --local-port 40077: " + strings.Join(got, " and "), nil
		}},
		{"L-HTTP", "curl", func(w *world) (string, error) {
			sum := fmt.Sprintf("%x", sha256.Sum256(w.page))
			out, err := w.run(w.c1, "sh", "-c", "curl -s -m 20 http://"+hostH+"/blob | sha256sum")
			if err != nil {
				return "", err
			}
			if !strings.HasPrefix(out, sum) {
				return "", fmt.Errorf("download of %d bytes came out changed: %s", bulk, tail(out))
			}
			file := filepath.Join(w.t.TempDir(), "page")
			if err := os.WriteFile(file, w.page, 0o600); err != nil {
				return "", err
			}
			if out, err = w.run(w.c1, "curl", "-s", "-m", "20", "-T", file, "http://"+hostH+"/put"); err != nil || out != sum {
				return "", fmt.Errorf("upload: %w: %s", err, tail(out))
			}
			n, err := w.connections(2000)
			if err != nil {
				return "", err
			}
			return fmt.Sprintf("curl: 20 MB both ways intact; %d connections without keepalive, 0 failed", n), nil
		}},
		{"L-DNS", "dig", func(w *world) (string, error) {
			script := "for i in $(seq 40); do dig +tries=1 +time=2 @" + hostH + " example.org | grep -c NOERROR; done | grep -c 1"
			return expect(w, w.c1, `^40\n`, "sh", "-c", script)
		}},
		{"L-SIP", "sipp", func(w *world) (string, error) {
			server := exec.Command("ip", "netns", "exec", w.s.name, "sipp", "-sn", "uas", "-i", hostH, "-nostdin")
			server.Dir = w.t.TempDir()
			server.Env = append(os.Environ(), "TERM=xterm")
			if err := server.Start(); err != nil {
				return "", err
			}
			defer func() { _ = server.Process.Kill(); _ = server.Wait() }()
			w.listening("-u", 5060)
			out, err := w.run(w.c1, "env", "TERM=xterm", "sipp", "-sn", "uac", "-i", hostV1, "-m", "20", "-r", "10", "-nostdin", hostH+":5060")
			if err != nil {
				return "", err
			}
			if !regexp.MustCompile(`Successful call\s*\|\s*\d+\s*\|\s*20`).MatchString(out) {
				return "", fmt.Errorf("sipp: %s", tail(out))
			}
			return "sipp: 20 of 20 calls", nil
		}},
		{"L-UDPBIG", "", func(w *world) (string, error) {
			var got int
			err := w.c1.do(func() error {
				c, err := net.Dial("udp4", hostH+":7")
				if err != nil {
					return err
				}
				defer c.Close()
				sent := w.page[:8000]
				_ = c.SetDeadline(time.Now().Add(5 * time.Second))
				if _, err := c.Write(sent); err != nil {
					return err
				}
				buf := make([]byte, 9000)
				if got, err = c.Read(buf); err != nil {
					return err
				}
				if !bytes.Equal(buf[:got], sent) {
					return fmt.Errorf("%d bytes came back changed", got)
				}
				return nil
			})
			return fmt.Sprintf("UDP echo of %d bytes identical", got), err
		}},
		{"L-HALFCLOSE", "", func(w *world) (string, error) {
			err := w.c1.do(func() error {
				c, err := net.Dial("tcp4", hostH+":7")
				if err != nil {
					return err
				}
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(20 * time.Second))
				sent := w.page[:3<<20]
				fail := make(chan error, 1)
				go func() {
					_, err := c.Write(sent)
					fail <- errorsJoin(err, c.(*net.TCPConn).CloseWrite())
				}()
				got, err := io.ReadAll(c)
				if err := errorsJoin(err, <-fail); err != nil {
					return err
				}
				if !bytes.Equal(got, sent) {
					return fmt.Errorf("%d bytes back, want %d", len(got), len(sent))
				}
				return nil
			})
			return "3 MB echoed past the client's half close, identical", err
		}},
		{"L-HAIRPIN", "curl", func(w *world) (string, error) {
			var got []string
			for _, n := range []*namespace{w.c2, w.c1} {
				out, err := w.run(n, "curl", "-s", "-m", "5", "http://"+gatewayV+":8088/ip")
				if err != nil {
					return "", err
				}
				got = append(got, out)
			}
			return "curl from V2 and from the target: peer " + strings.Join(got, " and "), nil
		}},
		{"L-FWD", "curl", func(w *world) (string, error) {
			return expect(w, w.s, regexp.QuoteMeta(hostH+":"), "curl", "-s", "-m", "5", "http://"+gatewayO+":8080/ip")
		}},
		{"CK-OFFLOAD", "iperf3", offload},
	}
}

func errorsJoin(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// connections fetches a small page over n connections.
func (w *world) connections(n int) (int, error) {
	for i := range n {
		err := w.c1dial(func(c net.Conn) error {
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			if _, err := io.WriteString(c, "GET /ip HTTP/1.0\r\n\r\n"); err != nil {
				return err
			}
			b, err := io.ReadAll(c)
			if err == nil && !bytes.Contains(b, []byte(gatewayO+":")) {
				err = fmt.Errorf("answer %q", tail(string(b)))
			}
			return err
		})
		if err != nil {
			return i, fmt.Errorf("connection %d: %w", i, err)
		}
	}
	return n, nil
}

func (w *world) c1dial(f func(net.Conn) error) error {
	return w.c1.do(func() error {
		c, err := net.DialTimeout("tcp4", hostH+":80", 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		return f(c)
	})
}

// offload moves bulk data with offloads on at every interface and looks at the
// checksum counters of the far host.
func offload(w *world) (string, error) {
	server := exec.Command("ip", "netns", "exec", w.s.name, "iperf3", "-s")
	if err := server.Start(); err != nil {
		return "", err
	}
	defer func() { _ = server.Process.Kill(); _ = server.Wait() }()
	w.listening("-t", 5201)
	var rates []string
	lost := 0.0
	for _, how := range [][]string{nil, {"-R"}, {"-u", "-b", "20M", "-l", "1400"}} {
		out, err := w.run(w.c1, append([]string{"iperf3", "-c", hostH, "-t", "2", "-J"}, how...)...)
		if err != nil {
			return "", err
		}
		var r struct {
			End struct {
				Received struct {
					Rate float64 `json:"bits_per_second"`
				} `json:"sum_received"`
				Sum struct {
					Lost float64 `json:"lost_packets"`
					Rate float64 `json:"bits_per_second"`
				} `json:"sum"`
			} `json:"end"`
		}
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			return "", err
		}
		rates = append(rates, fmt.Sprintf("%.2f", max(r.End.Received.Rate, r.End.Sum.Rate)/1e9))
		lost = r.End.Sum.Lost // by a busy machine: no failure of this row
	}
	for _, n := range []*namespace{w.s, w.c1} {
		out, err := w.run(n, "nstat", "-az", "TcpInCsumErrors", "UdpInCsumErrors", "IpReasmFails")
		if err != nil {
			return "", err
		}
		for line := range strings.Lines(out) {
			if f := strings.Fields(line); len(f) > 1 && !strings.HasPrefix(line, "#") && f[1] != "0" {
				return "", fmt.Errorf("%s", tail(line))
			}
		}
	}
	return "iperf3 up, down, UDP: " + strings.Join(rates, ", ") + fmt.Sprintf(" Gbit/s, %v datagrams lost, no checksum errors at the ends", lost), nil
}

// TestPrograms runs real programs through the engine in namespaces.
func TestPrograms(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("needs root for network namespaces")
	}
	w := newWorld(t)
	for _, p := range slices.Concat(probePrograms(), transferPrograms(), pathPrograms()) {
		t.Run(p.row+"/"+p.need, func(t *testing.T) {
			w.t = t
			q := requirementOf(p.row)
			if p.need != "" {
				if _, err := exec.LookPath(p.need); err != nil {
					t.Skipf("%s isn't installed", p.need)
				}
			}
			evidence, err := p.run(w)
			if err != nil {
				ours.add(q, fails, "real hosts: "+err.Error())
				if _, known := knownFailures[p.row]; !known || *strict && q.binding() {
					t.Error(err)
				}
				return
			}
			ours.add(q, green, evidence)
			t.Log(evidence)
		})
	}
}

func requirementOf(id string) requirement {
	for _, q := range requirements {
		if q.id == id {
			return q
		}
	}
	panic("no row " + id)
}
