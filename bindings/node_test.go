//go:build libzt

package bindings_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"ztgate/bindings"
	"ztgate/router/admin"
	"ztgate/zerotier/ztnode"
)

// wire carries datagrams between the nodes of a test.
type wire struct {
	mu    sync.Mutex
	hosts map[netip.AddrPort]*host
}

// host is the one socket of a node. It never blocks a sender: what doesn't fit is
// lost, as on any wire.
type host struct {
	w     *wire
	self  netip.AddrPort
	queue chan datagram
	ended chan struct{}
	once  sync.Once
}

type datagram struct {
	from netip.AddrPort
	data []byte
}

func (w *wire) open(self string) *host {
	h := &host{w: w, self: netip.MustParseAddrPort(self), queue: make(chan datagram, 4096), ended: make(chan struct{})}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.hosts == nil {
		w.hosts = map[netip.AddrPort]*host{}
	}
	w.hosts[h.self] = h
	return h
}

func (h *host) Run(ctx context.Context, handle func(int, uint32, netip.AddrPort, []byte), flush func(int)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case d := <-h.queue:
			handle(0, 1, d.from, d.data)
			for more := true; more; {
				select {
				case d := <-h.queue:
					handle(0, 1, d.from, d.data)
				default:
					more = false
				}
			}
			flush(0)
		}
	}
}

func (h *host) NewSender() bindings.Sender       { return sender{h} }
func (h *host) LocalEndpoints() []netip.AddrPort { return []netip.AddrPort{h.self} }
func (h *host) Ports() []int                     { return []int{int(h.self.Port())} }
func (h *host) RebindSecondary() error           { return nil }
func (h *host) Close() error                     { h.once.Do(func() { close(h.ended) }); return nil }

type sender struct{ h *host }

func (s sender) Send(socket uint32, to netip.AddrPort, head, data []byte) {
	s.h.w.mu.Lock()
	dst := s.h.w.hosts[to]
	s.h.w.mu.Unlock()
	if dst == nil {
		return
	}
	select {
	case dst.queue <- datagram{s.h.self, append(bytes.Clone(head), data...)}:
	default:
	}
}

func (s sender) SendTTL(socket uint32, to netip.AddrPort, data []byte, ttl int) {} // there is no NAT to open
func (s sender) Flush()                                                         {}

// node is a node of a test with what it received.
type node struct {
	*bindings.Node
	home   string
	frames chan []byte
}

// start makes a node and runs it for the length of the test.
func start(t *testing.T, w *wire, home, self string, planet []byte) *node {
	t.Helper()
	n := &node{home: home, frames: make(chan []byte, 4096)}
	var err error
	if n.Node, err = bindings.New(config(w, home, self, planet, func(_ uint64, frames [][]byte) {
		for _, f := range frames {
			n.frames <- bytes.Clone(f)
		}
	})); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return n
}

func config(w *wire, home, self string, planet []byte, onFrames func(uint64, [][]byte)) bindings.Config {
	return bindings.Config{Home: home, Planet: planet, OnFrames: onFrames,
		OpenUDP: func(func(netip.Addr) bool) (bindings.UDP, error) { return w.open(self), nil }}
}

const (
	rootEndpoint = "10.99.0.1:9993"
	aEndpoint    = "10.99.1.2:9993"
	bEndpoint    = "10.99.2.3:9993"
	adhoc        = 0xff1c000000000001 // needs no controller (chapter 03 §1.8)
)

// rootHome makes a root's home and the planet that names it.
func rootHome(t *testing.T) (home string, planet []byte) {
	t.Helper()
	home = newHome(t)
	file, _, _, err := admin.MakePlanet(admin.PlanetSpec{Now: time.Now(),
		Roots: []string{filepath.Join(home, "identity.public") + "=" + strings.Replace(rootEndpoint, ":", "/", 1)}})
	if err != nil {
		t.Fatal(err)
	}
	return home, file
}

// newHome makes a home with an identity, which the core makes far faster than Go
// under the race detector does.
func newHome(t *testing.T) string {
	t.Helper()
	home := t.TempDir()
	n, err := bindings.New(config(&wire{}, home, aEndpoint, nil, nil))
	if err != nil {
		t.Fatal(err)
	}
	must(t, n.Close())
	return home
}

// await waits for changes of a node until f is true.
func await(t *testing.T, n *node, what string, f func() bool) {
	t.Helper()
	changes, stop := n.Watch()
	defer stop()
	deadline := time.After(40 * time.Second)
	for !f() {
		select {
		case <-changes:
		case <-deadline:
			t.Fatalf("%s: not within 40 s: %+v %+v", what, n.Info(), n.Networks())
		}
	}
}

func networkOf(n *node, id ztnode.NetworkID) (ztnode.Network, bool) {
	for _, v := range n.Networks() {
		if v.ID == id {
			return v, true
		}
	}
	return ztnode.Network{}, false
}

func frame(dst, src [6]byte, kind uint16, payload []byte) []byte {
	f := append(append([]byte{}, dst[:]...), src[:]...)
	return append(binary.BigEndian.AppendUint16(f, kind), payload...)
}

func arp(op uint16, mac [6]byte, from, to netip.Addr) []byte {
	b := append([]byte{0, 1, 8, 0, 6, 4, 0, byte(op)}, mac[:]...)
	b = append(append(b, from.AsSlice()...), make([]byte, 6)...)
	return append(b, to.AsSlice()...)
}

var broadcast = [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

func write(t *testing.T, n *node, frames ...[]byte) int {
	t.Helper()
	sizes := make([]int, len(frames))
	for i := range frames {
		sizes[i] = len(frames[i])
	}
	ok, err := n.WriteFrames(adhoc, frames, sizes, 0)
	if err != nil {
		t.Fatal(err)
	}
	return ok
}

func next(t *testing.T, n *node, kind uint16) []byte {
	t.Helper()
	for {
		select {
		case f := <-n.frames:
			if binary.BigEndian.Uint16(f[12:]) == kind {
				return f
			}
		case <-time.After(20 * time.Second):
			t.Fatal("no frame came")
		}
	}
}

// A root and two nodes in memory: they come online, join, resolve addresses by
// multicast, and exchange batches of frames.
func TestFrames(t *testing.T) {
	t.Parallel()
	w := &wire{}
	home, planet := rootHome(t)
	r := start(t, w, home, rootEndpoint, planet)
	a := start(t, w, newHome(t), aEndpoint, planet)
	b := start(t, w, newHome(t), bEndpoint, planet)
	var nets [2]ztnode.Network
	for i, n := range []*node{a, b} {
		if err := n.Join(adhoc); err != nil {
			t.Fatal(err)
		}
		await(t, n, "network OK", func() bool {
			v, ok := networkOf(n, adhoc)
			nets[i] = v
			return ok && v.Status == "OK" && n.Info().Online
		})
		if v := nets[i]; v.MTU != 2800 || v.Type != "PUBLIC" || len(v.Addresses) != 2 {
			t.Errorf("network %+v", v)
		}
	}
	v4 := func(v ztnode.Network) netip.Addr {
		for _, p := range v.Addresses {
			if p.Addr().Is4() {
				return p.Addr()
			}
		}
		t.Fatalf("no IPv4 address in %+v", v)
		return netip.Addr{}
	}
	var request []byte
	for deadline := time.Now().Add(20 * time.Second); ; { // until B's subscription has reached A
		write(t, a, frame(broadcast, nets[0].MAC, 0x0806, arp(1, nets[0].MAC, v4(nets[0]), v4(nets[1]))))
		select {
		case request = <-b.frames:
		case <-time.After(200 * time.Millisecond):
			if time.Now().After(deadline) {
				t.Fatal("no ARP request came")
			}
			continue
		}
		break
	}
	if want := frame(broadcast, nets[0].MAC, 0x0806, arp(1, nets[0].MAC, v4(nets[0]), v4(nets[1]))); !bytes.Equal(request, want) {
		t.Errorf("request %x, want %x", request, want)
	}

	// More than one crossing's worth, of all sizes.
	random := rand.NewChaCha8([32]byte{1})
	var sent [][]byte
	for i := range 200 {
		p := make([]byte, 64+i*13)
		_, _ = random.Read(p)
		binary.BigEndian.PutUint32(p, uint32(i))
		sent = append(sent, frame(nets[1].MAC, nets[0].MAC, 0x88b5, p))
	}
	for i := 0; i < len(sent); i += 10 { // the wire's queue is finite
		if got := write(t, a, sent[i:i+10]...); got != 10 {
			t.Fatalf("accepted %d of 10", got)
		}
		for j := range 10 {
			if got := next(t, b, 0x88b5); !bytes.Equal(got, sent[i+j]) {
				t.Fatalf("frame %d differs: %d bytes, want %d", i+j, len(got), len(sent[i+j]))
			}
		}
	}
	if got := write(t, a, sent[:150]...); got != 150 {
		t.Errorf("accepted %d of 150", got)
	}
	for i := range 150 {
		if got := next(t, b, 0x88b5); !bytes.Equal(got, sent[i]) {
			t.Fatalf("frame %d of the large batch differs", i)
		}
	}

	// What the core would not refuse itself.
	if got := write(t, a, frame(nets[0].MAC, nets[0].MAC, 0x88b5, []byte("to myself")),
		frame(nets[1].MAC, nets[0].MAC, 0x88b5, make([]byte, 2801)), []byte("short")); got != 0 {
		t.Errorf("accepted %d frames that must not go", got)
	}
	if s := a.Stats(); s.OwnMAC != 1 || s.Oversize != 2 {
		t.Errorf("own MAC %d, oversize %d, want 1 and 2", s.OwnMAC, s.Oversize)
	}
	if n, err := a.WriteFrames(adhoc+1, [][]byte{sent[0]}, []int{len(sent[0])}, 0); n != 0 || err != nil || a.Stats().NoNetwork != 1 {
		t.Errorf("frame of an unknown network: %d, %v, counted %d", n, err, a.Stats().NoNetwork)
	}
	if s := a.Stats(); s.TxBytes[3] == 0 || s.TxFragments == 0 {
		t.Errorf("counters %+v: want suite 3 and fragments", s)
	}

	direct := false
	for _, p := range a.Peers() {
		direct = direct || p.Address == b.Info().Address && !p.Relayed && p.Role == "LEAF" && p.Paths[0].Endpoint == netip.MustParseAddrPort(bEndpoint)
		if p.Address == r.Info().Address && p.Role != "PLANET" {
			t.Errorf("root is a %s", p.Role)
		}
	}
	if !direct {
		t.Errorf("no direct path: %+v", a.Peers())
	}

	// Leaving forgets, and frames no longer come.
	if err := b.Leave(adhoc); err != nil {
		t.Fatal(err)
	}
	if _, ok := networkOf(b, adhoc); ok {
		t.Error("still in the network")
	}
	if _, err := os.Stat(filepath.Join(b.home, "networks.d", fmt.Sprintf("%016x.conf", uint64(adhoc)))); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("configuration is still there: %v", err)
	}
}

// Nodes are closed while others write and while datagrams come in.
func TestCloseUnderLoad(t *testing.T) {
	t.Parallel()
	w := &wire{}
	home, planet := rootHome(t)
	for range 3 {
		n, err := bindings.New(config(w, home, rootEndpoint, planet, nil))
		if err != nil {
			t.Fatal(err)
		}
		if err := n.Join(adhoc); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		var all sync.WaitGroup
		all.Go(func() {
			if err := n.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		<-n.Ready()
		started := make(chan struct{}, 3)
		for range 3 {
			all.Go(func() {
				f := frame(broadcast, [6]byte{2}, 0x88b5, make([]byte, 1000))
				s := sender{w.open(aEndpoint)}
				for i := 0; ctx.Err() == nil || i < 100; i++ {
					_, _ = n.WriteFrames(adhoc, [][]byte{f}, []int{len(f)}, 0)
					s.Send(1, netip.MustParseAddrPort(rootEndpoint), nil, f[:i%1000])
					n.Peers()
					if i == 100 {
						started <- struct{}{}
					}
				}
			})
		}
		<-started
		cancel()
		all.Wait()
		if got, err := n.WriteFrames(adhoc, [][]byte{make([]byte, 100)}, []int{100}, 0); got != 0 || err != nil {
			t.Errorf("after the end: %d, %v", got, err)
		}
		if err := n.Join(adhoc + 1<<32); err == nil {
			t.Error("joined after the end")
		}
	}
}

// A home in any bad state is refused with its cause and left as it was.
func TestHome(t *testing.T) {
	t.Parallel()
	_, planet := rootHome(t)
	other := newHome(t)
	read := func(t *testing.T, path string) []byte {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, c := range []struct {
		name  string
		spoil func(t *testing.T, home string)
		want  error
	}{
		{"readable by others", func(t *testing.T, home string) { must(t, os.Chmod(filepath.Join(home, "identity.secret"), 0o644)) }, ztnode.ErrIdentityPermissions},
		{"public without secret", func(t *testing.T, home string) { must(t, os.Remove(filepath.Join(home, "identity.secret"))) }, ztnode.ErrIdentityMismatch},
		{"public of another", func(t *testing.T, home string) {
			must(t, os.WriteFile(filepath.Join(home, "identity.public"), read(t, filepath.Join(other, "identity.public")), 0o644))
		}, ztnode.ErrIdentityMismatch},
		{"public only in the secret file", func(t *testing.T, home string) {
			must(t, os.WriteFile(filepath.Join(home, "identity.secret"), read(t, filepath.Join(home, "identity.public")), 0o600))
		}, ztnode.ErrIdentityInvalid},
		{"keys changed", func(t *testing.T, home string) {
			b := read(t, filepath.Join(home, "identity.secret"))
			for i := range 4 {
				b[20+i] = '0'
			}
			must(t, os.WriteFile(filepath.Join(home, "identity.secret"), b, 0o600))
			must(t, os.Remove(filepath.Join(home, "identity.public")))
		}, ztnode.ErrIdentityInvalid},
		{"not a directory", func(t *testing.T, home string) {
			must(t, os.RemoveAll(filepath.Join(home, "peers.d")), os.WriteFile(filepath.Join(home, "peers.d"), nil, 0o600))
		}, ztnode.ErrHomeUnusable},
	} {
		t.Run(c.name, func(t *testing.T) {
			home := newHome(t)
			c.spoil(t, home)
			before, _ := os.ReadFile(filepath.Join(home, "identity.secret"))
			n, err := bindings.New(config(&wire{}, home, aEndpoint, planet, nil))
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if err == nil {
				must(t, n.Close())
			}
			if after, _ := os.ReadFile(filepath.Join(home, "identity.secret")); !bytes.Equal(before, after) {
				t.Error("identity.secret was changed")
			}
		})
	}
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// A node without an identity makes one, keeps it, and keeps others out.
func TestNewIdentity(t *testing.T) {
	t.Parallel()
	_, planet := rootHome(t)
	home := t.TempDir()
	n, err := bindings.New(config(&wire{}, home, aEndpoint, planet, nil))
	if err != nil {
		t.Fatal(err)
	}
	address := n.Info().Address
	if _, err := bindings.New(config(&wire{}, home, aEndpoint, planet, nil)); !errors.Is(err, ztnode.ErrHomeInUse) {
		t.Errorf("second node in the same home: %v", err)
	}
	must(t, n.Join(adhoc), n.Close())
	id, err := admin.CheckIdentity(filepath.Join(home, "identity.secret"), nil)
	if err != nil || id.Address != address || !id.Secret {
		t.Errorf("identity %+v, %v, want address %s", id, err, address)
	}
	fi, err := os.Stat(filepath.Join(home, "identity.secret"))
	must(t, err)
	if fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", fi.Mode())
	}
	again, err := bindings.New(config(&wire{}, home, aEndpoint, nil, nil))
	if err != nil {
		t.Fatal(err)
	}
	i := again.Info()
	want, err := admin.ShowPlanet(planet)
	must(t, err)
	kept := i.PlanetID == want.ID && i.PlanetTimestamp == want.Timestamp
	if _, joined := networkOf(&node{Node: again}, adhoc); i.Address != address || !joined || !kept {
		t.Errorf("after a restart: %s, joined %v, planet kept %v", i.Address, joined, kept)
	}
	must(t, again.Close())
}

// TestLeaks joins and leaves, and starts and stops, and compares what is left.
// ZTGATE_LIBZT_CYCLES multiplies the cycles: 100 means 10,000 and 1,000.
func TestLeaks(t *testing.T) {
	factor, err := strconv.Atoi(os.Getenv("ZTGATE_LIBZT_CYCLES"))
	if err != nil {
		factor = 1
	}
	w := &wire{}
	home, planet := rootHome(t)
	n, err := bindings.New(config(w, home, rootEndpoint, planet, nil))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	cycle := func(times int) {
		for i := range times {
			id := adhoc + ztnode.NetworkID(i%16)<<32
			must(t, n.Join(id), n.Leave(id))
		}
	}
	cycle(50)
	before := use(t)
	cycle(100 * factor)
	compare(t, fmt.Sprintf("%d join/leave", 100*factor), before, use(t))
	cancel()
	must(t, <-done)

	restart := func(times int) {
		for range times {
			n, err := bindings.New(config(w, home, rootEndpoint, planet, nil))
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 1)
			go func() { done <- n.Run(ctx) }()
			<-n.Ready()
			must(t, n.Join(adhoc))
			cancel()
			must(t, <-done)
		}
	}
	restart(30) // contexts of deleted nodes are kept for ten seconds
	before = use(t)
	restart(10 * factor)
	compare(t, fmt.Sprintf("%d start/stop", 10*factor), before, use(t))
}

type usage struct{ rss, goroutines, threads, files int }

func use(t *testing.T) usage {
	t.Helper()
	runtime.GC()
	b, err := os.ReadFile("/proc/self/status")
	must(t, err)
	u := usage{goroutines: runtime.NumGoroutine()}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		switch f[0] {
		case "VmRSS:":
			u.rss, err = strconv.Atoi(f[1])
		case "Threads:":
			u.threads, err = strconv.Atoi(f[1])
		}
		must(t, err)
	}
	files, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	u.files = len(files)
	return u
}

// compare allows what is not per cycle: a warm heap, threads of the Go runtime.
func compare(t *testing.T, what string, before, after usage) {
	t.Helper()
	t.Logf("%s: before %+v, after %+v", what, before, after)
	if after.rss > before.rss+24<<10 || after.goroutines > before.goroutines || after.threads > before.threads+8 || after.files > before.files {
		t.Errorf("%s left something: before %+v, after %+v", what, before, after)
	}
}
