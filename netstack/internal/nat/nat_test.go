package nat

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
)

var external = netip.MustParseAddr("10.0.0.1")

// player drives a table on a clock of its own.
type player struct {
	t   testing.TB
	tab *Table
	r   *Reader
	now int64
	n   int // packets sent

	paired bool // flows leave from external's group
}

func newPlayer(t testing.TB, s Settings) *player {
	if s.Seed == [32]byte{} {
		s.Seed = [32]byte{1}
	}
	tab := New(s)
	return &player{t: t, tab: tab, r: tab.NewReader(), now: 1}
}

// sleep lets time pass.
func (p *player) sleep(d time.Duration) {
	p.now += int64(d)
	p.tab.Sweep(p.now)
}

// send gives a packet to the table, opening a masqueraded flow if need be. It
// returns what comes out.
func (p *player) send(side Side, b []byte) (string, Refusal) {
	p.t.Helper()
	p.r.Enter()
	defer p.r.Leave()
	var v ipkt.View
	if r := ipkt.Parse(b, &v); r != ipkt.OK {
		p.t.Fatalf("packet refused: %v", r)
	}
	if p.n++; p.n%2 == 0 && p.fast(side, b) {
		return pkttest.Describe(b), Accepted
	}
	var k Key
	if !p.tab.KeyOf(side, &v, &k) {
		return "", Protocol
	}
	f, dir := p.tab.Find(p.now, &k)
	if f == nil {
		if side == Overlay {
			return "", Accepted
		}
		n := NewFlow{To: Overlay, Source: Masquerade, Address: ipkt.Bytes(external), Paired: p.paired}
		asked := p.tab.MayOpen(p.now, &k, &v, &n)
		var why Refusal
		if f, dir, why = p.tab.Open(p.now, &k, &v, &n); why != asked && !(p.tab.set.MaxHalfOpen > 0 && min(asked, why) == Accepted && max(asked, why) == TableFull) {
			p.t.Errorf("%s: asked, it is refused with %q, opened with %q", pkttest.Describe(b), RefusalNames[asked], RefusalNames[why])
		}
		if why != Accepted {
			return "", why
		}
	}
	if p.tab.Track(p.now, f, dir, &v) != Pass {
		return "", Accepted
	}
	f.Rewrite(dir, &v)
	f.Count(dir, 1, uint64(len(v.B)))
	return pkttest.Describe(b), Accepted
}

// fast is send for what may take the fast path; it reports whether the packet did.
func (p *player) fast(side Side, b []byte) bool {
	plain, l4, ttl := ipkt.Plain6, 40, 7
	if b[0] == 0x45 {
		plain, l4, ttl = ipkt.Plain4, 20, 8
	}
	size, proto := plain(b)
	if size == 0 {
		return false
	}
	f, dir := p.match(p.begin(side, b), side, b)
	if f == nil || proto == ipkt.UDP && !p.tab.PassUDP(Coarse(p.now), f, dir) || proto == ipkt.TCP && !p.tab.PassTCP(Coarse(p.now), f, dir, b[l4:size]) {
		return false
	}
	if l4 == 20 {
		f.Forward4(dir, b)
	} else {
		f.Forward6(dir, b)
	}
	b[ttl]++ // only this path takes one off
	if l4 == 20 {
		ipkt.FixHeader(b)
	}
	f.Count(dir, 1, uint64(size))
	return true
}

// begin and match are the lookup of the fast path.
func (p *player) begin(side Side, b []byte) Ref {
	if b[0] == 0x45 {
		return p.tab.Begin(p.tab.Hash4(side, (*ipkt.Head4)(b)))
	}
	return p.tab.Begin(p.tab.Hash6(side, (*ipkt.Head6)(b)))
}

func (p *player) match(ref Ref, side Side, b []byte) (*Flow, int) {
	if b[0] == 0x45 {
		return p.tab.Match4(ref, side, (*ipkt.Head4)(b))
	}
	return p.tab.Match6(ref, side, (*ipkt.Head6)(b))
}

func (p *player) want(what string, side Side, b []byte, want string) {
	p.t.Helper()
	if got, why := p.send(side, b); got != want {
		p.t.Errorf("%s: %q (%d), want %q", what, got, why, want)
	}
}

func (p *player) mustPass(what string, side Side, b []byte) string {
	p.t.Helper()
	got, why := p.send(side, b)
	if got == "" {
		p.t.Fatalf("%s: %s refused (%d)", what, pkttest.Describe(b), why)
	}
	return got
}

// Segments of a connection from V1 to O1.
const (
	v1, v2, o1 = "172.31.0.10:4000", "172.31.0.11:4000", "10.0.0.10:80"
	ro         = "10.0.0.1:4000"
	fin        = ipkt.FIN | ipkt.ACK
	synack     = ipkt.SYN | ipkt.ACK
)

func (p *player) handshake(client, outside string) {
	p.t.Helper()
	p.mustPass("SYN", VPC, pkttest.TCP(client, o1, ipkt.SYN, 100, 0, ""))
	p.mustPass("SYN/ACK", Overlay, pkttest.TCP(o1, outside, synack, 500, 101, ""))
	p.mustPass("ACK", VPC, pkttest.TCP(client, o1, ipkt.ACK, 101, 501, ""))
}

func (p *player) close(client, outside string) {
	p.t.Helper()
	p.mustPass("FIN", VPC, pkttest.TCP(client, o1, fin, 101, 501, ""))
	p.mustPass("FIN", Overlay, pkttest.TCP(o1, outside, fin, 501, 102, ""))
	p.mustPass("last ACK", VPC, pkttest.TCP(client, o1, ipkt.ACK, 102, 502, ""))
}

// state returns the state of the only flow.
func (p *player) state() (out string) {
	p.r.Enter()
	defer p.r.Leave()
	p.tab.Walk(func(i Info) bool { out += i.State; return true })
	return out
}

func TestFlowSize(t *testing.T) {
	if n := unsafe.Sizeof(Flow{}); n != 192 {
		t.Errorf("a flow has %d bytes, want three cache lines", n)
	}
}

func TestConnection(t *testing.T) {
	p := newPlayer(t, Settings{})
	p.handshake(v1, ro)
	if s := p.state(); s != "established" {
		t.Errorf("after the handshake: %s", s)
	}
	p.want("data", VPC, pkttest.TCP(v1, o1, ipkt.ACK, 101, 501, "hello"), "tcp 10.0.0.1:4000 > 10.0.0.10:80")
	p.want("reply", Overlay, pkttest.TCP(o1, ro, ipkt.ACK, 501, 106, "hello"), "tcp 10.0.0.10:80 > 172.31.0.10:4000")
	p.mustPass("FIN", VPC, pkttest.TCP(v1, o1, fin, 106, 506, ""))
	if s := p.state(); s != "closing" {
		t.Errorf("after one FIN: %s", s)
	}
	p.mustPass("L-HALFCLOSE: data after FIN", Overlay, pkttest.TCP(o1, ro, ipkt.ACK, 506, 107, "more"))
	p.mustPass("FIN", Overlay, pkttest.TCP(o1, ro, fin, 510, 107, ""))
	p.mustPass("last ACK", VPC, pkttest.TCP(v1, o1, ipkt.ACK, 107, 511, ""))
	if s := p.state(); s != "closed" {
		t.Errorf("after both FINs: %s", s)
	}
	p.mustPass("new SYN on the same tuple", VPC, pkttest.TCP(v1, o1, ipkt.SYN, 90000, 0, ""))
	p.mustPass("its SYN/ACK", Overlay, pkttest.TCP(o1, ro, synack, 70000, 90001, ""))
	if s := p.state(); s != "opening" {
		t.Errorf("opened again: %s", s)
	}
}

func TestSimultaneousOpen(t *testing.T) {
	p := newPlayer(t, Settings{})
	p.mustPass("SYN", VPC, pkttest.TCP(v1, o1, ipkt.SYN, 100, 0, ""))
	p.mustPass("SYN of the other side", Overlay, pkttest.TCP(o1, ro, ipkt.SYN, 500, 0, ""))
	p.mustPass("SYN/ACK", VPC, pkttest.TCP(v1, o1, synack, 100, 501, ""))
	p.mustPass("SYN/ACK", Overlay, pkttest.TCP(o1, ro, synack, 500, 101, ""))
	p.mustPass("ACK", VPC, pkttest.TCP(v1, o1, ipkt.ACK, 101, 501, ""))
	p.mustPass("data", Overlay, pkttest.TCP(o1, ro, ipkt.ACK, 501, 101, "x"))
	if s := p.state(); s != "established" {
		t.Errorf("5382-REQ-2a: %s", s)
	}
}

func TestReset(t *testing.T) {
	for _, tt := range []struct {
		row       string
		seq       uint32
		passes    bool
		wantState string
	}{
		{"L-RST-EXACT", 501, true, "reset"},
		{"L-RST-WIN", 501 + 20000, true, "established"},
		{"L-RST-OUT", 501 + 1<<30, false, "established"},
	} {
		p := newPlayer(t, Settings{})
		p.handshake(v1, ro)
		got, _ := p.send(Overlay, pkttest.TCP(o1, ro, ipkt.RST, tt.seq, 0, ""))
		if (got != "") != tt.passes || p.state() != tt.wantState {
			t.Errorf("%s: passed %q, state %s", tt.row, got, p.state())
		}
		p.sleep(200 * time.Second)
		p.mustPass("7857-S2.2: data after a RST", Overlay, pkttest.TCP(o1, ro, ipkt.ACK, 501, 101, "x"))
		if s := p.state(); s != "established" {
			t.Errorf("%s: after data: %s", tt.row, s)
		}
	}
	p := newPlayer(t, Settings{})
	p.mustPass("SYN", VPC, pkttest.TCP(v1, o1, ipkt.SYN, 100, 0, ""))
	p.want("L-RST-SYN: wrong ack", Overlay, pkttest.TCP(o1, ro, ipkt.RST|ipkt.ACK, 0, 77777, ""), "")
	if s := p.state(); s != "new" {
		t.Errorf("L-RST-SYN: state after the wrong one %s", s)
	}
	p.mustPass("L-RST-SYN: right ack", Overlay, pkttest.TCP(o1, ro, ipkt.RST|ipkt.ACK, 0, 101, ""))
	p.sleep(3 * time.Second)
	if n := p.tab.Len(); n != 0 {
		t.Errorf("L-RST-SYN: %d flows left", n)
	}
}

func TestWindow(t *testing.T) {
	for _, off := range []bool{false, true} {
		p := newPlayer(t, Settings{NoWindow: off})
		p.handshake(v1, ro)
		for name, b := range map[string][]byte{
			"out": pkttest.TCP(v1, o1, ipkt.ACK, 101+3<<28, 501, "x"),
			"ack": pkttest.TCP(v1, o1, ipkt.ACK, 101, 501+1<<20, "x"),
		} {
			if got, _ := p.send(VPC, b); (got != "") != off {
				t.Errorf("L-TCP-OOW %s: passed %q with the check off %v", name, got, off)
			}
		}
		if got, _ := p.send(Overlay, pkttest.TCP(o1, ro, ipkt.ACK, 501+3<<28, 101, "x")); (got != "") != off {
			t.Errorf("L-TCP-OOW in: passed %q with the check off %v", got, off)
		}
	}
}

// TestWindowScale lets a sender use a scaled window, and not more.
func TestWindowScale(t *testing.T) {
	p := newPlayer(t, Settings{})
	scale := []byte{3, 3, 7, 0}
	syn := func(src, dst string, flags uint8, seq, ack uint32) []byte {
		return pkttest.Packet{Proto: ipkt.TCP, Src: pkttest.Addr(src), Dst: pkttest.Addr(dst), Flags: flags, Seq: seq, Ack: ack, Options: scale}.Bytes()
	}
	seg := func(src, dst string, seq, ack uint32, win uint16) []byte {
		return pkttest.Packet{Proto: ipkt.TCP, Src: pkttest.Addr(src), Dst: pkttest.Addr(dst), Flags: ipkt.ACK, Seq: seq, Ack: ack, Window: win, Payload: []byte("x")}.Bytes()
	}
	p.mustPass("SYN", VPC, syn(v1, o1, ipkt.SYN, 100, 0))
	p.mustPass("SYN/ACK", Overlay, syn(o1, ro, synack, 500, 101))
	p.mustPass("ACK", VPC, seg(v1, o1, 101, 501, 1000)) // may be sent 128000 bytes
	p.mustPass("far into the window", Overlay, seg(o1, ro, 501+127000, 102, 1000))
	p.want("beyond it", Overlay, seg(o1, ro, 501+129000, 102, 1000), "")
}

func TestFirstSegments(t *testing.T) {
	for flags, want := range map[uint8]bool{
		0: false, ipkt.FIN: false, ipkt.SYN | ipkt.FIN: false, ipkt.SYN | ipkt.RST: false, 0x29: false, 0x3f: false, 0x13: false,
		ipkt.RST: false, fin: false, synack: false, ipkt.SYN: true, ipkt.ACK: true, ipkt.ACK | 0x08: true,
	} {
		p := newPlayer(t, Settings{})
		got, why := p.send(VPC, pkttest.TCP(v1, o1, flags, 100, 200, ""))
		if (got != "") != want {
			t.Errorf("L-TCP-FLAGS %#x: passed %q (%d)", flags, got, why)
		}
		if !want && p.tab.Len() != 0 {
			t.Errorf("L-TCP-FLAGS %#x opened a flow", flags)
		}
	}
	p := newPlayer(t, Settings{NoPickup: true})
	p.want("L-TCP-PICKUP off", VPC, pkttest.TCP(v1, o1, ipkt.ACK, 100, 200, "x"), "")
}

func TestTimers(t *testing.T) {
	udp := func(p *player) { p.mustPass("out", VPC, pkttest.UDP(v1, o1, "x")) }
	answered := func(p *player) { udp(p); p.mustPass("in", Overlay, pkttest.UDP(o1, ro, "x")) }
	syn := func(p *player) { p.mustPass("SYN", VPC, pkttest.TCP(v1, o1, ipkt.SYN, 100, 0, "")) }
	for _, tt := range []struct {
		row   string
		open  func(p *player)
		lives time.Duration
	}{
		{"4787-REQ-5", udp, 2 * time.Minute},
		{"4787-REQ-5c", answered, 5 * time.Minute},
		{"5508-REQ-2", func(p *player) { p.mustPass("out", VPC, pkttest.Echo("172.31.0.10", "10.0.0.10", false, 7, "x")) }, time.Minute},
		{"5382-REQ-5t, SYN", syn, 4 * time.Minute},
		{"5382-REQ-5t, SYN/ACK", func(p *player) { syn(p); p.mustPass("in", Overlay, pkttest.TCP(o1, ro, synack, 500, 101, "")) }, 4 * time.Minute},
		{"5382-REQ-5t, closed", func(p *player) { p.handshake(v1, ro); p.close(v1, ro) }, 4 * time.Minute},
		{"5382-REQ-5e, half-closed", func(p *player) { p.handshake(v1, ro); p.mustPass("FIN", VPC, pkttest.TCP(v1, o1, fin, 101, 501, "")) }, 124 * time.Minute},
		{"5382-REQ-5e", func(p *player) { p.handshake(v1, ro) }, 5 * 24 * time.Hour},
	} {
		for _, sweep := range []bool{false, true} {
			p := newPlayer(t, Settings{})
			tt.open(p)
			wait := func(d time.Duration) {
				if p.now += int64(d); sweep {
					p.tab.Sweep(p.now)
				}
			}
			find := func() bool {
				p.r.Enter()
				defer p.r.Leave()
				alive := false
				p.tab.Walk(func(i Info) bool {
					k := i.key(FromClient)
					p.tab.sum(&k)
					f, _ := p.tab.Find(p.now, &k)
					alive = f != nil
					return true
				})
				return alive
			}
			wait(tt.lives - time.Second)
			if !find() {
				t.Errorf("%s: gone before %v (sweep %v)", tt.row, tt.lives, sweep)
			}
			wait(2 * time.Second)
			if find() {
				t.Errorf("%s: still there after %v (sweep %v)", tt.row, tt.lives, sweep)
			}
			if p.tab.Len() != 0 {
				t.Errorf("%s: %d flows in the table", tt.row, p.tab.Len())
			}
		}
	}
}

func TestMapping(t *testing.T) {
	p := newPlayer(t, Settings{})
	for _, dst := range []string{"10.0.0.10:5000", "10.0.0.10:5001", "10.0.0.11:5000"} {
		p.want("4787-REQ-1", VPC, pkttest.UDP(v1, dst, "x"), "udp 10.0.0.1:4000 > "+dst)
	}
	a := p.mustPass("other host", VPC, pkttest.UDP(v2, "10.0.0.11:5000", "x"))
	if a == "udp 10.0.0.1:4000 > 10.0.0.11:5000" {
		t.Error("4787-REQ-3: two hosts share a port")
	}
	var port int
	fmt.Sscanf(a, "udp 10.0.0.1:%d", &port)
	p.want("4787-REQ-1 after a collision", VPC, pkttest.UDP(v2, "10.0.0.10:5000", "x"), fmt.Sprintf("udp 10.0.0.1:%d > 10.0.0.10:5000", port))
	p.want("7857-S5", VPC, pkttest.TCP(v2, o1, ipkt.SYN, 1, 0, ""), "tcp 10.0.0.1:4000 > 10.0.0.10:80")
	for _, want := range []int{7, 53, 500, 511, 512, 1023, 1024, 65535} {
		src := fmt.Sprintf(":%d", want)
		p.want("L-PORT", VPC, pkttest.UDP("172.31.0.10"+src, o1, "x"), fmt.Sprintf("udp 10.0.0.1:%d > 10.0.0.10:80", want))
		fmt.Sscanf(p.mustPass("collision", VPC, pkttest.UDP("172.31.0.11"+src, o1, "x")), "udp 10.0.0.1:%d", &port)
		if port == want || port < 1024 != (want < 1024) || isLocal(uint16(port)) {
			t.Errorf("4787-REQ-3a: %d became %d", want, port)
		}
	}
}

// TestSeed: replaced ports are the same after a restart, and others with another
// seed.
func TestSeed(t *testing.T) {
	replaced := func(seed byte) string {
		p := newPlayer(t, Settings{Seed: [32]byte{seed}})
		p.mustPass("first", VPC, pkttest.UDP(v1, o1, "x"))
		return p.mustPass("second", VPC, pkttest.UDP(v2, o1, "x"))
	}
	if a, b := replaced(7), replaced(7); a != b {
		t.Errorf("same seed: %q and %q", a, b)
	}
	if a, b := replaced(7), replaced(8); a == b {
		t.Errorf("other seed: %q again", a)
	}
}

func TestPortQuarantine(t *testing.T) {
	p := newPlayer(t, Settings{})
	p.mustPass("first", VPC, pkttest.UDP(v1, o1, "x"))
	p.sleep(121 * time.Second)
	if n := p.tab.Len(); n != 0 {
		t.Fatalf("%d flows left", n)
	}
	if got := p.mustPass("other host", VPC, pkttest.UDP(v2, o1, "x")); got == "udp 10.0.0.1:4000 > 10.0.0.10:80" {
		t.Error("6888-REQ-8: a freed port was given to another host at once")
	}
	p.want("its owner gets it back", VPC, pkttest.UDP(v1, o1, "x"), "udp 10.0.0.1:4000 > 10.0.0.10:80")
	p.sleep(245 * time.Second)
	p.want("after the rest", VPC, pkttest.UDP("172.31.0.12:4000", o1, "x"), "udp 10.0.0.1:4000 > 10.0.0.10:80")
}

func TestReserved(t *testing.T) {
	p := newPlayer(t, Settings{})
	p.tab.Reserve(ipkt.UDP, []netip.AddrPort{netip.MustParseAddrPort(ro)})
	if got := p.mustPass("out", VPC, pkttest.UDP(v1, o1, "x")); got == "udp 10.0.0.1:4000 > 10.0.0.10:80" {
		t.Error("L-FWD-SHADOW: a forwarded port was given away")
	}
}

// endpoint is the i-th of many client endpoints.
func endpoint(i int) string {
	return fmt.Sprintf("172.31.%d.%d:%d", i/50000/250, 1+i/50000%250, 1024+i%50000)
}

// TestPortExhaustion uses up the ports of the address with answered flows.
func TestPortExhaustion(t *testing.T) {
	for _, mode := range []PortSharing{NoSharing, ByDestination} {
		if mode != NoSharing && testing.Short() {
			break
		}
		p := newPlayer(t, Settings{PortSharing: mode})
		opened, outside, refused := 0, map[int]bool{}, int64(0)
		for i := range 62000 {
			host := i % 1100
			got, _ := p.send(VPC, pkttest.UDP(fmt.Sprintf("172.31.%d.%d:%d", host/250, 1+host%250, 1024+i), o1, "x"))
			if got == "" {
				refused++
				continue
			}
			opened++
			var port int
			fmt.Sscanf(got, "udp 10.0.0.1:%d", &port)
			outside[port] = true
			p.mustPass("answer", Overlay, pkttest.UDP(o1, fmt.Sprintf("10.0.0.1:%d", port), "x"))
			p.mustPass("after it", VPC, pkttest.UDP(fmt.Sprintf("172.31.%d.%d:%d", host/250, 1+host%250, 1024+i), o1, "x"))
		}
		if want := 64512 - (LocalPortLast - LocalPortFirst + 1); opened != want || len(outside) != want {
			t.Errorf("6888-REQ-13: %d flows at %d ports to one destination, want %d", opened, len(outside), want)
		}
		if n := p.tab.stats.Refused[ClassUDP][NoPort].Load(); n != refused {
			t.Errorf("%d refusals counted, want %d", n, refused)
		}
		got, why := p.send(VPC, pkttest.UDP("172.31.200.1:4000", "10.0.0.11:80", "x"))
		if (got != "") != (mode == ByDestination) {
			t.Errorf("D1: other destination, sharing %v: %q (%d)", mode, got, why)
		}
		p.want("existing mapping, other destination", VPC, pkttest.UDP("172.31.0.1:1024", "10.0.0.11:80", "x"), "udp 10.0.0.1:1024 > 10.0.0.11:80")
		p.mustPass("low port", VPC, pkttest.UDP("172.31.200.1:500", o1, "x"))
		p.check()
	}
}

// TestShortConnections: for an hour, thousands of connections a second from few
// addresses to one server, without one refused.
func TestShortConnections(t *testing.T) {
	p := newPlayer(t, Settings{})
	const perSecond, hosts, open = 2000, 4, 5000
	seconds := 3600
	if testing.Short() {
		seconds = 8
	}
	type conn struct{ client, outside string }
	var live []conn
	next := [hosts]int{}
	for s := range seconds {
		if s > 40 && s%100 != 0 { // the state is steady: one second of every hundred stands for them
			p.sleep(time.Second)
			continue
		}
		for range perSecond {
			h := s % hosts
			next[h]++
			client := fmt.Sprintf("172.31.0.%d:%d", 10+h, 32768+next[h]%28000)
			got, why := p.send(VPC, pkttest.TCP(client, o1, ipkt.SYN, 100, 0, ""))
			if got == "" {
				t.Fatalf("connection refused in second %d: %d", s, why)
			}
			var port int
			fmt.Sscanf(got, "tcp 10.0.0.1:%d", &port)
			c := conn{client, fmt.Sprintf("10.0.0.1:%d", port)}
			p.mustPass("SYN/ACK", Overlay, pkttest.TCP(o1, c.outside, synack, 500, 101, ""))
			p.mustPass("ACK", VPC, pkttest.TCP(c.client, o1, ipkt.ACK, 101, 501, ""))
			if live = append(live, c); len(live) > open {
				p.close(live[0].client, live[0].outside)
				live = live[1:]
			}
		}
		p.sleep(time.Second)
	}
}

func TestClientLimits(t *testing.T) {
	p := newPlayer(t, Settings{MaxPortsPerClient: 100})
	open := func(host string, n int, tcp bool) (ok int) {
		for i := range n {
			b := pkttest.UDP(fmt.Sprintf("%s:%d", host, 2000+i), o1, "x")
			if tcp {
				b = pkttest.TCP(fmt.Sprintf("%s:%d", host, 2000+i), o1, ipkt.SYN, 1, 0, "")
			}
			if got, _ := p.send(VPC, b); got != "" {
				ok++
			}
		}
		return ok
	}
	if a, b, c := open("172.31.0.10", 150, false), open("172.31.0.11", 10, false), open("172.31.0.10", 10, true); a != 100 || b != 10 || c != 10 {
		t.Errorf("6888-REQ-4: %d, %d and %d flows, want 100, 10 and 10", a, b, c)
	}
	if n := p.tab.stats.Refused[ClassUDP][ClientPorts].Load(); n != 50 {
		t.Errorf("%d refusals counted, want 50", n)
	}
	p = newPlayer(t, Settings{FlowRatePerClient: 20})
	if a := open("172.31.0.10", 50, false); a != 20 {
		t.Errorf("rate: %d flows at once, want 20", a)
	}
	p.sleep(time.Second)
	if a := open("172.31.0.10", 120, false); a < 38 || a > 41 { // the first 20 exist already
		t.Errorf("rate: %d flows a second later, want 40", a)
	}
	p = newPlayer(t, Settings{MaxHalfOpen: 30})
	p.handshake(v1, ro)
	if a := open("172.31.0.10", 100, true); a != 100 || p.tab.Len() != 31 {
		t.Errorf("half-open: %d opened, %d in the table, want 100 and 31", a, p.tab.Len())
	}
}

// TestFullTable: decision D4.
func TestFullTable(t *testing.T) {
	p := newPlayer(t, Settings{MaxFlows: 2000, MaxFlowsPerClient: 2000})
	p.handshake(v2, ro)
	for i := range 10000 {
		p.mustPass("L-SYNFLOOD", VPC, pkttest.TCP(fmt.Sprintf("172.31.0.10:%d", 5000+i), o1, ipkt.SYN, 1, 0, ""))
	}
	if n := p.tab.Len(); n != 2000 {
		t.Errorf("%d flows, want 2000", n)
	}
	p.mustPass("established flow", VPC, pkttest.TCP(v2, o1, ipkt.ACK, 101, 501, "x"))
	for i := range 20 {
		c := fmt.Sprintf("172.31.0.11:%d", 20000+i)
		p.mustPass("new flow of another host", VPC, pkttest.TCP(c, o1, ipkt.SYN, 1, 0, ""))
	}
	for i := range 20 { // they are still there when their answer comes
		p.mustPass("its answer", Overlay, pkttest.TCP(o1, fmt.Sprintf("10.0.0.1:%d", 20000+i), synack, 1, 2, ""))
	}
	// A table full of answered flows refuses new ones.
	p = newPlayer(t, Settings{MaxFlows: 2000, MaxFlowsPerClient: 2000})
	for i := range 2000 {
		p.mustPass("out", VPC, pkttest.UDP(endpoint(i), o1, "x"))
		p.mustPass("in", Overlay, pkttest.UDP(o1, fmt.Sprintf("10.0.0.1:%d", 1024+i), "x"))
		p.mustPass("after it", VPC, pkttest.UDP(endpoint(i), o1, "x"))
	}
	if _, why := p.send(VPC, pkttest.UDP(v2, o1, "x")); why != TableFull {
		t.Errorf("L-TABLE-ASSURED: %d, want refused", why)
	}
	p.want("L-TABLE-ASSURED: old flow", Overlay, pkttest.UDP(o1, "10.0.0.1:1024", "x"), "udp 10.0.0.10:80 > 172.31.0.1:1024")
	p.sleep(5*time.Minute + time.Second)
	if n := p.tab.Len(); n != 0 {
		t.Errorf("L-TABLE-GC: %d flows left", n)
	}
	p.mustPass("after the sweep", VPC, pkttest.UDP(v2, o1, "x"))
	p.check()
}

// check compares the table's accounts with what is in it.
func (p *player) check() {
	p.t.Helper()
	t := p.tab
	t.mu.Lock()
	defer t.mu.Unlock()
	flows, halfOpen, chained := 0, 0, 0
	refs, firm := map[*mapping]int{}, map[*mapping]bool{}
	live := map[*client]int32{}
	for id := uint32(1); id <= t.used; id++ {
		f := t.flow(id)
		s := f.state.Load()
		if s == stateFree || s&stateMask == stateDead {
			continue
		}
		flows++
		if isHalfOpen(s) {
			halfOpen++
		}
		if !isClosed(s) {
			live[t.clientOf(f)]++
		}
		if f.Mapped() {
			m := t.pools[f.pool].at(f.ExtPort())
			refs[m]++
			firm[m] = firm[m] || isFirm(s)
		}
		for dir := range 2 {
			k := f.key(dir)
			t.sum(&k)
			if got, ref := t.lookup(&k); got != f || int(ref&1) != dir {
				p.t.Errorf("flow %d is not found by its direction %d", id, dir)
			}
		}
	}
	for i := range t.buckets {
		for ref := t.buckets[i].Load(); ref != 0; ref = t.flow(ref >> 1).next[ref&1].Load() {
			chained++
		}
	}
	if flows != t.count || chained != 2*flows {
		p.t.Errorf("%d flows, %d references, count %d", flows, chained, t.count)
	}
	all, idle := 0, 0
	var half [numStandings]int
	var weakOf [numStandings]map[*ranks[portShare]]int
	for s := range weakOf {
		weakOf[s] = map[*ranks[portShare]]int{}
	}
	var members [maxMembers]holding
	for _, c := range t.clients {
		all += int(c.flows)
		half[c.standing] += c.half.Count()
		for s := c.shares; s != nil; s = s.next {
			weakOf[c.standing][&s.pool.weak[s.class]] += s.Count()
		}
		if c.flows == 0 {
			idle++
		}
		if c.live != live[c] {
			p.t.Errorf("client %v has %d live flows, counted %d", ipkt.Addr(c.key.addr), live[c], c.live)
		}
		m := &members[c.member]
		m.live += c.live
		for class := range c.ports {
			for pc, n := range c.ports[class] {
				m.ports[class][pc] += n
			}
		}
	}
	if all != flows || t.halfOpen.count() != halfOpen {
		p.t.Errorf("clients have %d flows; the table %d and %d half-open, counted %d", all, flows, halfOpen, t.halfOpen.count())
	}
	for s, n := range half {
		if t.halfOpen.of(standing(s)) != n {
			p.t.Errorf("clients of standing %d have %d half-open flows, counted %d", s, n, t.halfOpen.of(standing(s)))
		}
	}
	remembered := 0
	for c := t.remembered.first; c != nil; c = c.later {
		if c.flows != 0 || c.shares != nil || t.clients[c.key] != c {
			p.t.Errorf("client %v is remembered and has flows", ipkt.Addr(c.key.addr))
		}
		remembered++
	}
	if remembered != idle || remembered != t.remembered.n || remembered > maxRemembered {
		p.t.Errorf("%d clients without flows, %d remembered, counted %d", idle, remembered, t.remembered.n)
	}
	for _, c := range t.recent {
		if c != nil && t.clients[c.key] != c {
			p.t.Errorf("client %v is found, but has no account", ipkt.Addr(c.key.addr))
		}
	}
	if members != t.members {
		p.t.Error("members have more or less than their clients")
	}
	inUse := 0
	for _, pool := range t.pools[1:] {
		used, weak := 0, [2]int{}
		for port := range 1 << 16 {
			port := uint16(port)
			if !pool.used.has(port) {
				if pool.listed.has(port) {
					p.t.Errorf("port %d is weak and not used", port)
				}
				continue
			}
			used++
			if pool.quarantined.has(port) {
				continue
			}
			m, n, firmFirst := pool.at(port), 0, true
			inUse++
			for id := m.flows; id != 0; id = t.links(id).next {
				if n > 0 && id == m.flows {
					break
				}
				now := isFirm(t.flow(id).state.Load())
				if now && !firmFirst {
					p.t.Errorf("port %d has a firm flow behind others", port)
				}
				firmFirst = now
				n++
			}
			if n != refs[m] {
				p.t.Errorf("port %d has %d flows, counted %d", port, refs[m], n)
			}
			if pool.listed.has(port) == firm[m] {
				p.t.Errorf("port %d is weak %v, has a firm flow %v", port, pool.listed.has(port), firm[m])
			}
			if pool.listed.has(port) {
				weak[portClass(pool.key.proto, port)]++
			}
		}
		left, size := pool.left, pool.size
		if pool.countLeft(); pool.left != left || pool.size != size {
			p.t.Errorf("%v ports left of %v by class, counted %v of %v", pool.left, pool.size, left, size)
		}
		if used != pool.inUse+pool.inQuarantine {
			p.t.Errorf("%d ports used, counted %d in use and %d resting", used, pool.inUse, pool.inQuarantine)
		}
		for pc, n := range weak {
			if pool.weak[pc].count() != n {
				p.t.Errorf("%d weak ports in class %d, counted %d", n, pc, pool.weak[pc].count())
			}
			for s := range weakOf {
				if got, want := pool.weak[pc].of(standing(s)), weakOf[s][&pool.weak[pc]]; got != want {
					p.t.Errorf("clients of standing %d have %d weak ports in class %d, counted %d", s, want, pc, got)
				}
			}
		}
	}
	p.checkPairs()
	ports := 0
	for class := range members[0].ports {
		for i := range members {
			ports += members[i].portsOf(class)
		}
	}
	if ports != inUse {
		p.t.Errorf("%d ports in use, clients have %d", inUse, ports)
	}
}

// TestMemory: at most 256 bytes a flow, everything included.
func TestMemory(t *testing.T) {
	const flows = 100000
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	// From 2000 clients; half TCP, half UDP, each at a port of its own.
	packets := [2][]byte{pkttest.UDP(v1, o1, ""), pkttest.TCP(v1, o1, ipkt.SYN, 1, 0, "")}
	before := heap()
	p := newPlayer(t, Settings{MaxFlows: flows})
	p.r.Enter()
	for i := range flows {
		var v ipkt.View
		var k Key
		ipkt.Parse(packets[i%2], &v)
		v.Src[14], v.Src[15] = byte(i/2%2000>>8), byte(i/2%2000)
		v.SPort = uint16(1024 + i/2)
		p.tab.KeyOf(VPC, &v, &k)
		if _, _, why := p.tab.Open(p.now, &k, &v, &NewFlow{To: Overlay, Source: Masquerade, Address: ipkt.Bytes(external)}); why != Accepted {
			t.Fatalf("flow %d refused: %d", i, why)
		}
	}
	p.r.Leave()
	per := float64(heap()-before) / flows
	t.Logf("%.0f bytes a flow", per)
	if per > 256 {
		t.Errorf("%.0f bytes a flow, want at most 256", per)
	}
	runtime.KeepAlive(p)
}

func TestNoAllocs(t *testing.T) {
	p := newPlayer(t, Settings{})
	p.handshake(v1, ro)
	b := pkttest.TCP(v1, o1, ipkt.ACK, 101, 501, "hello")
	work := append([]byte(nil), b...)
	var v ipkt.View
	var k Key
	if n := testing.AllocsPerRun(100, func() {
		copy(work, b)
		p.r.Enter()
		ipkt.Parse(work, &v)
		p.tab.KeyOf(VPC, &v, &k)
		f, dir := p.tab.Find(p.now, &k)
		if p.tab.Track(p.now, f, dir, &v) == Pass {
			f.Rewrite(dir, &v)
		}
		f.Count(dir, 1, uint64(len(v.B)))
		p.r.Leave()
	}); n != 0 {
		t.Errorf("%v allocations a packet", n)
	}
}

func TestErrors(t *testing.T) {
	p := newPlayer(t, Settings{})
	p.mustPass("out", VPC, pkttest.UDP(v1, o1, "x"))
	translate := func(side Side, b []byte) string {
		var v ipkt.View
		if ipkt.Parse(b, &v) != ipkt.OK {
			return "refused"
		}
		p.r.Enter()
		defer p.r.Leave()
		if f, _, _ := p.tab.TranslateError(p.now, side, &v); f == nil {
			return ""
		}
		return pkttest.Describe(b)
	}
	quote := pkttest.UDP(ro, o1, "x")
	router, to := "10.0.0.2", "10.0.0.1"
	good := func() []byte { return pkttest.ICMPError(router, to, 3, 3, 0, quote, 28) }
	if got, want := translate(Overlay, good()), "icmp 3/3 10.0.0.2 > 172.31.0.10 [17 172.31.0.10:4000 > 10.0.0.10:80]"; got != want {
		t.Errorf("5508-REQ-4a: %q, want %q", got, want)
	}
	bad := good()
	bad[22] ^= 1
	if got := translate(Overlay, bad); got != "" {
		t.Errorf("5508-REQ-3: passed %q", got)
	}
	if got := translate(Overlay, pkttest.ICMPError(router, "10.0.0.99", 3, 3, 0, quote, 28)); got != "" {
		t.Errorf("5508-REQ-4: passed %q", got)
	}
	if got := translate(Overlay, pkttest.ICMPError(router, to, 3, 3, 0, pkttest.UDP("10.0.0.1:4999", o1, "x"), 28)); got != "" {
		t.Errorf("5508-REQ-4, no mapping: passed %q", got)
	}
	for n := range 28 {
		if got := translate(Overlay, pkttest.ICMPError(router, to, 3, 3, 0, quote, n)); got != "" {
			t.Errorf("5508-REQ-4, %d bytes quoted: passed %q", n, got)
		}
	}
	options := pkttest.Packet{Src: pkttest.Addr(ro), Dst: pkttest.Addr(o1), IPOptions: []byte{7, 11, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0}, Payload: []byte("x")}.Bytes()
	if got, want := translate(Overlay, pkttest.ICMPError(router, to, 3, 3, 0, options, 60)), "icmp 3/3 10.0.0.2 > 172.31.0.10 [17 172.31.0.10:4000 > 10.0.0.10:80]"; got != want {
		t.Errorf("5508-REQ-3b: %q, want %q", got, want)
	}
	// RFC 4884: length 32 words, padding to 128 bytes, an MPLS object.
	extension := []byte{0x20, 0, 0, 0, 0, 8, 1, 1, 0, 1, 2, 3}
	padded := append(append(append([]byte(nil), quote...), make([]byte, 128-len(quote))...), extension...)
	e := pkttest.ICMPError(router, to, 11, 0, 32<<16, padded, 1000)
	if got := translate(Overlay, e); got != "icmp 11/0 10.0.0.2 > 172.31.0.10 [17 172.31.0.10:4000 > 10.0.0.10:80]" ||
		string(e[len(e)-len(extension):]) != string(extension) || binary.BigEndian.Uint32(e[24:]) != 32<<16 {
		t.Errorf("4884-4: %q, tail %x", got, e[len(e)-len(extension):])
	}
	// From inside, also from a router behind the client.
	for _, src := range []string{"172.31.0.10", "172.31.0.200"} {
		got := translate(VPC, pkttest.ICMPError(src, "10.0.0.10", 3, 3, 0, pkttest.UDP(o1, v1, "x"), 28))
		if want := "icmp 3/3 10.0.0.1 > 10.0.0.10 [17 10.0.0.10:80 > 10.0.0.1:4000]"; got != want {
			t.Errorf("5508-REQ-5c: %q, want %q", got, want)
		}
	}
}

// TestMatch begins at a flow and compares it with packets that differ in one bit
// of their tuple.
func TestMatch(t *testing.T) {
	for _, b := range [][]byte{pkttest.UDP(v1, o1, "x"), pkttest.TCP(v1, o1, ipkt.SYN, 1, 0, ""), pkttest.UDP("[fd77:1::10]:4000", "[fd77:2::10]:80", "x")} {
		p := newPlayer(t, Settings{})
		var v ipkt.View
		var k Key
		ipkt.Parse(b, &v)
		p.tab.KeyOf(VPC, &v, &k)
		if _, _, why := p.tab.Open(p.now, &k, &v, &NewFlow{To: Overlay}); why != Accepted {
			t.Fatal(why)
		}
		addrs, proto, ports := 12, 9, 20
		if v.V6 {
			addrs, proto, ports = 8, 6, 40
		}
		back := bytes.Clone(b)
		n := (ports - addrs) / 2
		copy(back[addrs:], b[addrs+n:ports])
		copy(back[addrs+n:], b[addrs:addrs+n])
		copy(back[ports:], b[ports+2:ports+4])
		copy(back[ports+2:], b[ports:ports+2])
		for side, b := range [][]byte{VPC: b, Overlay: back} {
			side := Side(side)
			ref := p.begin(side, b)
			if f, _ := p.match(ref, side, b); f == nil {
				t.Fatalf("%s isn't found", pkttest.Describe(b))
			}
			if f, _ := p.match(ref, 1-side, b); f != nil {
				t.Errorf("%s is found from the other side", pkttest.Describe(b))
			}
			for i := proto * 8; i < (ports+4)*8; i++ {
				if at := i / 8; at != proto && at < addrs {
					continue
				}
				b[i/8] ^= 1 << (i % 8)
				if f, _ := p.match(ref, side, b); f != nil {
					t.Errorf("found with bit %d changed: %x", i, b)
				}
				b[i/8] ^= 1 << (i % 8)
			}
		}
	}
}

// TestChecksums translates UDP packets with every checksum there is, on both ways:
// none becomes zero, which would mean that there is none (RFC 768).
func TestChecksums(t *testing.T) {
	p := newPlayer(t, Settings{})
	for range 2 {
		for x := range 0x10000 {
			b := pkttest.UDP(v1, o1, string([]byte{byte(x >> 8), byte(x)}))
			p.mustPass("packet", VPC, b)
			var v ipkt.View
			if ipkt.Parse(b, &v) != ipkt.OK || !v.ChecksumOK() || b[26] == 0 && b[27] == 0 {
				t.Fatalf("payload %04x: %x", x, b)
			}
		}
		p.mustPass("packet", VPC, pkttest.UDP(v1, o1, "")) // the others take turns
	}
}

// TestConcurrent lets readers find, follow and rewrite while others open, evict
// and expire: a reader never sees a flow turn into another one.
func TestConcurrent(t *testing.T) {
	tab := New(Settings{MaxFlows: 300, MaxFlowsPerClient: 300, Seed: [32]byte{1}})
	var clock atomic.Int64
	clock.Store(1)
	var wg sync.WaitGroup
	rounds := 3000
	if testing.Short() {
		rounds = 500
	}
	for w := range 4 {
		wg.Go(func() {
			r := tab.NewReader()
			rng := rand.New(rand.NewPCG(uint64(w), 1))
			for range rounds {
				r.Enter()
				for range 16 {
					now := clock.Load()
					port := 2000 + rng.IntN(1000)
					b := pkttest.UDP(fmt.Sprintf("172.31.0.%d:%d", 10+w%2, port), o1, "x")
					var v ipkt.View
					var k Key
					ipkt.Parse(b, &v)
					tab.KeyOf(VPC, &v, &k)
					f, dir := tab.Find(now, &k)
					if f == nil {
						var why Refusal
						if f, dir, why = tab.Open(now, &k, &v, &NewFlow{To: Overlay, Source: Masquerade, Address: ipkt.Bytes(external)}); why != Accepted {
							continue
						}
					}
					if !f.is(dir, &k) {
						t.Errorf("found a flow of %v for %s", ipkt.Addr(f.Client()), pkttest.Describe(b))
					}
					tab.Track(now, f, dir, &v)
					f.Rewrite(dir, &v)
					f.Count(dir, 1, uint64(len(v.B)))
					if rng.IntN(50) == 0 {
						tab.Remove(f)
					}
				}
				r.Leave()
			}
		})
	}
	stop := make(chan struct{})
	var sweeper sync.WaitGroup
	sweeper.Go(func() {
		r := tab.NewReader()
		for {
			select {
			case <-stop:
				return
			default:
				tab.Sweep(clock.Add(int64(time.Second)))
				r.Enter()
				tab.Walk(func(i Info) bool {
					if k := i.key(FromServer); i.State == "dead" || i.State == "" || k.sport != 80 {
						t.Errorf("listed a flow in state %q to port %d", i.State, k.sport)
					}
					return true
				})
				r.Leave()
				runtime.Gosched()
			}
		}
	})
	wg.Wait()
	close(stop)
	sweeper.Wait()
	p := &player{t: t, tab: tab, r: tab.NewReader(), now: clock.Load()}
	p.check()
	if n := tab.Len(); n > 300 {
		t.Errorf("%d flows, want at most 300", n)
	}
}

func isLocal(port uint16) bool { return port >= LocalPortFirst && port <= LocalPortLast }

// TestOlderConnection: a client connects from a port whose older connection, of which
// nothing is known here, still stands at the server. The server's question and the
// client's RST pass, and then the connection opens.
func TestOlderConnection(t *testing.T) {
	p := newPlayer(t, Settings{})
	const client, server = "172.31.0.10:4000", "10.0.0.10:80"
	out := p.mustPass("SYN", VPC, pkttest.TCP(client, server, tcpSYN, 1000, 0, ""))
	outside := out[len("tcp "):strings.Index(out, " > ")]
	p.mustPass("challenge", Overlay, pkttest.TCP(server, outside, tcpACK, 77000, 500000, ""))
	p.mustPass("RST for the older one", VPC, pkttest.TCP(client, server, tcpRST, 500000, 0, ""))
	if got, _ := p.send(Overlay, pkttest.TCP(server, outside, tcpACK, 77000, 500000, "data")); got != "" {
		t.Errorf("data of the older connection: %q", got)
	}
	p.mustPass("SYN again", VPC, pkttest.TCP(client, server, tcpSYN, 1000, 0, ""))
	p.mustPass("SYN-ACK", Overlay, pkttest.TCP(server, outside, tcpSYN|tcpACK, 9000, 1001, ""))
	p.mustPass("ACK", VPC, pkttest.TCP(client, server, tcpACK, 1001, 9001, ""))
	p.mustPass("data", Overlay, pkttest.TCP(server, outside, tcpACK, 9001, 1001, "hello"))
}
