//go:build e2e

package faults

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/internal/testwait"
	"ztgate/router/admin"
	"ztgate/router/lab"
	"ztgate/router/lab/labtest"
)

// Hosts of the scenario. V2 is a second address of the client, office2 a second
// member of the network.
const (
	v1, v2     = "172.31.0.10", "172.31.0.11"
	office     = "10.0.0.10"
	office2    = "10.0.0.11"
	gwOverlay  = "10.0.0.1"
	echoPort   = 7
	forwardTo  = 8080
	patience   = 30 * time.Second
	probeEvery = 50 * time.Millisecond
)

// configuration of the gateway.
const configuration = `forwards:
  - {listen: "tcp/10.0.0.1:8080", to: "172.31.0.10:8080", from: overlay, masquerade: false}
  - {listen: "tcp/10.0.0.1:8081", to: "172.31.0.11:8080", from: overlay}
nat:
  port_sharing: by_destination
`

// world is a scenario, watched for leaks.
type world struct {
	*lab.Scenario
	t   *testing.T
	rng *rand.Rand

	skipped string // why the row that runs can't be run here

	client *echoServer // in the VPC, behind the forward
	office *echoServer
	leaks  atomic.Int64
	leak   atomic.Pointer[string]

	orderly atomic.Bool  // the gateway was asked to stop: its routes are gone
	astray  atomic.Int64 // packets that then left by the host's default route
}

// labName begins the prefix of every lab here; the number of the process and a
// name follow.
const labName = lab.DefaultPrefix + "f"

var labNames = regexp.MustCompile(`^` + labName + `(\d+)[a-z]+`)

// cleanUp removes the labs that killed runs left, once. Another run may be doing
// the same.
var cleanUp = sync.OnceValue(func() (err error) {
	entries, _ := os.ReadDir("/run/netns") // without it there are none
	done := map[string]bool{}
	for _, e := range entries {
		m := labNames.FindStringSubmatch(e.Name())
		if m == nil || done[m[0]] {
			continue
		}
		done[m[0]] = true
		if pid, e := strconv.Atoi(m[1]); e == nil && errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			err = errors.Join(err, lab.Down(m[0]))
		}
	}
	return err
})

func newWorld(t *testing.T, name string) *world {
	t.Helper()
	if err := cleanUp(); err != nil {
		t.Logf("remove what a killed run left: %v", err)
	}
	binary := os.Getenv("ZTGATE")
	if binary == "" {
		t.Fatal("set ZTGATE to the path of the program to test (make conformance does)")
	}
	s, err := lab.Start(context.Background(), lab.Options{Binary: binary, Config: configuration, Progress: io.Discard,
		Prefix: fmt.Sprintf("%s%d%s", labName, os.Getpid(), name)})
	w := &world{Scenario: s, t: t, rng: rand.New(rand.NewPCG(*seed, 3))}
	if s != nil {
		labtest.End(t, s.Topology)
	}
	if err != nil {
		t.Fatal(err)
	}
	w.must(s.VPC.AddAddress("eth0", netip.MustParsePrefix(v2+"/24")))
	// Packets that leave by the default route are seen on the way to it.
	w.sh(s.Gateway, "ip route add default via 203.0.113.1 dev eth-inet")
	w.office = w.echo(s.Office, fmt.Sprintf(":%d", echoPort))
	w.client = w.echo(s.VPC, fmt.Sprintf(":%d", forwardTo))
	w.watch(s.Office, "")
	w.watch(s.Root, "")
	w.watch(s.Gateway, "eth-inet")
	return w
}

func (w *world) must(err error) { w.t.Helper(); labtest.Must(w.t, err) }

func (w *world) sh(n *lab.Namespace, script string) string {
	w.t.Helper()
	return labtest.Shell(w.t, n, script)
}

// eventually waits until f returns no error, and returns how long that took.
func (w *world) eventually(d time.Duration, f func() error) time.Duration {
	w.t.Helper()
	start := time.Now()
	testwait.NoError(w.t, d, f)
	return time.Since(start).Round(10 * time.Millisecond)
}

// filter is a classic BPF program for sockets that see packets from the network
// header on.
type filter []unix.SockFilter

// accept if the byte, half or word at an offset, masked, is a value.
func match(size uint16, offset, mask, value uint32) filter {
	return filter{
		{Code: unix.BPF_LD | size | unix.BPF_ABS, K: offset},
		{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: mask},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: value, Jt: 0, Jf: 1},
		{Code: unix.BPF_RET, K: 0xffff},
		{Code: unix.BPF_RET, K: 0},
	}
}

var (
	fromVPC = match(unix.BPF_H, 12, 0xffff, 0xac1f) // source in 172.31.0.0/16
	isICMP  = match(unix.BPF_B, 9, 0xff, 1)
	isTCP   = match(unix.BPF_B, 9, 0xff, 6)
)

// sniff calls f for the IPv4 packets of a namespace, or of one of its interfaces,
// that pass a filter, until the test ends. The address says where one was seen.
func (w *world) sniff(n *lab.Namespace, ifname string, prog filter, f func(p []byte, at *unix.SockaddrLinklayer)) {
	w.t.Helper()
	fd := -1
	w.must(n.Do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		at := &unix.SockaddrLinklayer{Protocol: unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8}
		if ifname != "" {
			i, err := net.InterfaceByName(ifname)
			if err != nil {
				return err
			}
			at.Ifindex = i.Index
		}
		fp := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
		return errors.Join(unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &fp),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}),
			unix.Bind(fd, at))
	}))
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1<<16)
		for {
			k, from, err := unix.Recvfrom(fd, buf, 0)
			select {
			case <-quit:
				return
			default:
			}
			ll, ok := from.(*unix.SockaddrLinklayer)
			if err != nil || !ok || k < 20 || buf[0]>>4 != 4 {
				continue
			}
			f(buf[:k], ll)
		}
	}()
	w.t.Cleanup(func() {
		close(quit)
		<-done
		_ = unix.Close(fd)
	})
}

func describe(p []byte) string {
	s, d := netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
	what := fmt.Sprintf("protocol %d", p[9])
	if p[9] == unix.IPPROTO_ICMP && len(p) > 21 {
		what = fmt.Sprintf("ICMP %d/%d", p[20], p[21])
	}
	return fmt.Sprintf("%s %s > %s", what, s, d)
}

func outgoing(at *unix.SockaddrLinklayer) bool { return at.Pkttype == unix.PACKET_OUTGOING }

// watch is the leak watcher: it sees every packet, on the overlay and below it,
// whose source is a VPC address. Below, the gateway's host itself may use the one
// it has.
func (w *world) watch(n *lab.Namespace, ifname string) {
	w.t.Helper()
	below := 0
	w.must(n.Do(func() error {
		l, err := net.InterfaceByName("eth-inet")
		if err == nil {
			below = l.Index
		}
		return err
	}))
	own := netip.MustParseAddr("172.31.0.1").As4()
	w.sniff(n, ifname, fromVPC, func(p []byte, at *unix.SockaddrLinklayer) {
		if at.Ifindex == below && [4]byte(p[12:16]) == own {
			return
		}
		if w.orderly.Load() {
			w.astray.Add(1)
			return
		}
		w.leaks.Add(1)
		text := n.Name + ": " + describe(p)
		w.leak.Store(&text)
	})
}

// clean reports leaks.
func (w *world) clean() string {
	w.t.Helper()
	if n := w.leaks.Load(); n > 0 {
		w.t.Errorf("LEAK: %d packets with a VPC source outside, the last %s", n, *w.leak.Load())
	}
	return "leak watcher 0"
}

// refusals counts what must not reach the client while the gateway is down: ICMP
// unreachables and RSTs.
func (w *world) refusals() *refusals {
	r := &refusals{}
	w.sniff(w.VPC, "eth0", isICMP, func(p []byte, at *unix.SockaddrLinklayer) {
		if len(p) > 21 && !outgoing(at) && p[20] == 3 {
			r.unreachable.Add(1)
			r.code.Store(int64(p[21]))
			r.firstOnce.Do(func() { r.first.Store(time.Now().UnixNano()) })
		}
	})
	w.sniff(w.VPC, "eth0", isTCP, func(p []byte, at *unix.SockaddrLinklayer) {
		if len(p) > 33 && !outgoing(at) && p[33]&4 != 0 {
			r.resets.Add(1)
		}
	})
	return r
}

type refusals struct {
	unreachable, resets, code, first atomic.Int64
	firstOnce                        sync.Once
}

func (r *refusals) String() string {
	return fmt.Sprintf("%d unreachables, %d RSTs", r.unreachable.Load(), r.resets.Load())
}

func (r *refusals) none() bool { return r.unreachable.Load() == 0 && r.resets.Load() == 0 }

// echoServer sends back what it gets, over UDP after the sender's endpoint. TCP
// connections begin with the client's endpoint as a line.
type echoServer struct {
	udp     net.PacketConn
	mu      sync.Mutex
	conns   map[string]net.Conn
	altered atomic.Int64 // datagrams that are not what a probe sent
}

func (w *world) echo(n *lab.Namespace, at string) *echoServer {
	w.t.Helper()
	s := &echoServer{conns: map[string]net.Conn{}}
	l, err := n.Listen("tcp4", at)
	w.must(err)
	s.udp, err = n.ListenPacket("udp4", at)
	w.must(err)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.conns[c.RemoteAddr().String()] = c
			s.mu.Unlock()
			go func() {
				_, _ = fmt.Fprintln(c, c.RemoteAddr())
				_, _ = io.Copy(c, c)
				_ = c.Close()
			}()
		}
	}()
	go func() {
		b := make([]byte, 2000)
		for {
			k, from, err := s.udp.ReadFrom(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				if !intact(b[:k]) {
					s.altered.Add(1)
				}
				_, _ = s.udp.WriteTo(append([]byte(from.String()+" "), b[:k]...), from)
			}
		}
	}()
	w.t.Cleanup(func() {
		_ = l.Close()
		_ = s.udp.Close()
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, c := range s.conns {
			_ = c.Close()
		}
	})
	return s
}

// conn returns the server's end of a connection.
func (s *echoServer) conn(remote string) net.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conns[remote]
}

// message is a datagram whose content follows from its number.
func message(seq uint32) []byte {
	b := binary.BigEndian.AppendUint32(nil, seq)
	r := rand.New(rand.NewPCG(uint64(seq), 7))
	for range 40 {
		b = binary.BigEndian.AppendUint32(b, r.Uint32())
	}
	return b
}

func intact(b []byte) bool { return len(b) >= 4 && bytes.Equal(b, message(binary.BigEndian.Uint32(b))) }

// probe sends a numbered datagram each [probeEvery] and counts the answers.
type probe struct {
	conn    net.Conn
	mu      sync.Mutex
	sent    []time.Time
	got     []bool
	altered int
	ports   map[string]int // external endpoints seen by the server
	last    time.Time      // arrival
}

func (w *world) probe(from, to string) *probe {
	w.t.Helper()
	p := &probe{ports: map[string]int{}}
	w.must(w.VPC.Do(func() (err error) {
		d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.MustParseAddrPort(from))}
		p.conn, err = d.Dial("udp4", net.JoinHostPort(to, strconv.Itoa(echoPort)))
		return err
	}))
	quit, done := make(chan struct{}), make(chan struct{}, 2)
	go func() {
		defer func() { done <- struct{}{} }()
		t := time.NewTicker(probeEvery)
		defer t.Stop()
		for {
			p.mu.Lock()
			seq := uint32(len(p.sent))
			p.sent, p.got = append(p.sent, time.Now()), append(p.got, false)
			p.mu.Unlock()
			_, _ = p.conn.Write(message(seq)) // refused ones come back as errors
			select {
			case <-quit:
				return
			case <-t.C:
			}
		}
	}()
	go func() {
		defer func() { done <- struct{}{} }()
		b := make([]byte, 2000)
		for {
			k, err := p.conn.Read(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				p.take(b[:k])
			}
		}
	}()
	w.t.Cleanup(func() {
		close(quit)
		_ = p.conn.Close()
		<-done
		<-done
	})
	return p
}

func (p *probe) take(b []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = time.Now()
	from, body, ok := bytes.Cut(b, []byte(" "))
	if !ok || !intact(body) || int(binary.BigEndian.Uint32(body)) >= len(p.got) {
		p.altered++
		return
	}
	p.got[binary.BigEndian.Uint32(body)] = true
	p.ports[string(from)]++
}

// mark is the number of the next datagram.
func (p *probe) mark() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.sent)
}

// lost counts the datagrams from a mark on that got no answer, at least twenty,
// leaving those out that are still under way.
func (p *probe) lost(from int) (lost, of int) {
	const underWay = 10
	testwait.Poll(patience, func() bool { return p.mark() >= from+20+underWay })
	return p.lostBetween(from, p.mark()-underWay)
}

func (p *probe) lostBetween(from, to int) (lost, of int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := from; i < min(to, len(p.got)); i++ {
		if of++; !p.got[i] {
			lost++
		}
	}
	return lost, of
}

// endpoints lists the external endpoints that the server saw.
func (p *probe) endpoints() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.ports)
}

// answered fails unless the probe gets an answer to something sent from now on.
func (p *probe) answered() func() error {
	from := p.mark()
	return func() error {
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, ok := range p.got[from:] {
			if ok {
				return nil
			}
		}
		return errors.New("the probe gets no answer")
	}
}

// stream is a TCP connection to an echo server.
type stream struct {
	net.Conn
	seen string // the client's endpoint as the server sees it
}

// dial connects from an endpoint in a namespace.
func (w *world) dial(n *lab.Namespace, from, to string) *stream {
	w.t.Helper()
	s := &stream{}
	w.eventually(patience, func() error {
		return n.Do(func() (err error) {
			d := net.Dialer{Timeout: 5 * time.Second}
			if from != "" {
				d.LocalAddr = net.TCPAddrFromAddrPort(netip.MustParseAddrPort(from))
			}
			s.Conn, err = d.Dial("tcp4", to)
			return err
		})
	})
	w.t.Cleanup(func() { _ = s.Close() })
	line, err := s.line()
	w.must(err)
	s.seen = line
	return s
}

func (s *stream) line() (string, error) {
	_ = s.SetReadDeadline(time.Now().Add(patience))
	var out []byte
	for b := make([]byte, 1); ; {
		if _, err := s.Read(b); err != nil {
			return "", err
		}
		if b[0] == '\n' {
			return string(out), nil
		}
		out = append(out, b[0])
	}
}

// exchange sends a line and waits for it to come back.
func (s *stream) exchange() error {
	want := strconv.Itoa(rand.Int())
	_ = s.SetWriteDeadline(time.Now().Add(patience))
	if _, err := s.Write([]byte(want + "\n")); err != nil {
		return err
	}
	got, err := s.line()
	if err == nil && got != want {
		err = fmt.Errorf("got %q, want %q", got, want)
	}
	return err
}

// metrics returns the gateway's metrics.
func (w *world) metrics() lab.Metrics {
	w.t.Helper()
	var m lab.Metrics
	w.eventually(patience, func() (err error) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		m, err = w.Metrics(ctx)
		return err
	})
	return m
}

// rss returns the gateway's resident memory in bytes.
func (w *world) rss() int {
	w.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", w.GatewayProcess.PID))
	w.must(err)
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[0] == "VmRSS:" {
			kb, err := strconv.Atoi(f[1])
			w.must(err)
			return kb << 10
		}
	}
	w.t.Fatal("no VmRSS")
	return 0
}

func (w *world) descriptors() int {
	w.t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", w.GatewayProcess.PID))
	w.must(err)
	return len(list)
}

// startGateway starts the gateway again and returns after how long it was ready.
func (w *world) startGateway() time.Duration {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	start := time.Now()
	w.must(w.StartGateway(ctx))
	w.eventually(patience, func() error { return w.AwaitReady(ctx) })
	return time.Since(start).Round(10 * time.Millisecond)
}

// member starts the office, or another member with a home of its own.
func (w *world) member(n *lab.Namespace, name string) *lab.Process {
	w.t.Helper()
	p, err := w.Start(n, name, os.Getenv("ZTGATE"), "member", "--network", w.Network.String(), "--tun", "zt0", "--listen", "",
		"--node", "go", "--planet", filepath.Join(w.Dir, "planet"), "--socket", filepath.Join(w.Dir, name, "ztgate.sock"))
	w.must(err)
	return p
}

// addOffice2 adds a member with an echo server.
func (w *world) addOffice2() *echoServer {
	w.t.Helper()
	n, err := w.Namespace("office2")
	w.must(err)
	w.must(lab.Plug(n, "eth-inet", w.Inet, "br0", "office2"))
	w.must(n.AddAddress("eth-inet", netip.MustParsePrefix("203.0.113.30/24")))
	home, err := w.Home("office2")
	w.must(err)
	id, err := admin.NewIdentity(filepath.Join(home, "identity.secret"), filepath.Join(home, "identity.public"), false)
	w.must(err)
	w.authorise(id.Address, true, office2)
	w.member(n, "office2")
	w.watch(n, "")
	return w.echo(n, fmt.Sprintf(":%d", echoPort))
}

func (w *world) authorise(member string, yes bool, ips ...string) {
	w.t.Helper()
	patch, err := admin.MemberSpec{Authorized: &yes, IPs: ips}.Patch()
	w.must(err)
	w.must(w.SetMember(context.Background(), member, patch))
}

// logged counts the lines of the gateway's log with a text.
func (w *world) logged(text string) int {
	b, err := os.ReadFile(w.GatewayProcess.Log)
	w.must(err)
	n := 0
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}
