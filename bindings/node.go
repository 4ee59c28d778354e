//go:build libzt

package bindings

/*
#cgo CFLAGS: -Wall -Wextra -O2
#cgo !libzt_static LDFLAGS: -lzt -lstdc++ -lm -lpthread
#cgo libzt_static LDFLAGS: -l:libzt.a -lstdc++ -lm -lpthread
#cgo noescape shim_receive
#cgo noescape shim_write
#include "shim.h"
*/
import "C"

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime/cgo"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sync/errgroup"

	"ztgate/internal/watch"
	"ztgate/zerotier/ztnode"
)

const (
	ethLen       = 14
	defaultMTU   = 2800
	endpointsAge = time.Minute      // between announcements of our endpoints (chapter 05 §9.1)
	offlineLong  = 14 * time.Second // then the secondary port moves (chapter 05 §11)
	// lateGrace is how long a thread that answers a neighbour solicitation may
	// need (chapter 05 §8.4).
	lateGrace = 150 * time.Millisecond
)

// Node is one ZeroTier node. Its methods are safe for concurrent use.
type Node struct {
	cfg    Config
	log    *slog.Logger
	store  *store
	udp    UDP
	handle cgo.Handle
	clock  *clock
	info   ztnode.Info // Address, Identity, Version

	// life is held for reading during each call into the core but those of New and
	// Close. Callbacks never take it.
	life   sync.RWMutex
	closed bool
	c      *C.shim_node
	once   sync.Once
	ended  error

	free  chan *worker // idle ones of callers
	ready chan struct{}
	wake  chan struct{}

	// What callbacks write; all are held for moments only and never during a call
	// into the core.
	online, collision, late atomic.Bool
	fault                   atomic.Pointer[string]
	nets                    atomic.Pointer[map[ztnode.NetworkID]*ztnode.Network]
	inside                  atomic.Pointer[[]netip.Prefix]      // never an underlay path
	lastNDP                 atomic.Int64                        // Unix ns
	mu                      sync.Mutex                          // guards what follows and writes of nets
	fresh                   map[ztnode.NetworkID]bool           // networks whose subscriptions are due; true = anew
	groups                  map[ztnode.NetworkID][]ztnode.Group // as asked for by SetMulticastGroups
	watchers                watch.Watchers

	certificates certificates

	lateLost, oversize, ownMAC, noNetwork   atomic.Uint64
	txBytes, rxBytes                        [4]atomic.Uint64
	txFragments, rxFragments, full, refused atomic.Uint64
}

// worker is what one goroutine needs to cross into C.
type worker struct {
	b      *C.shim_batch
	out    Sender
	frames [][]byte
}

// clock gives wall time in ms that never goes back, as the core needs it.
type clock struct {
	start time.Time
	ahead atomic.Int64
}

func (c *clock) now() int64 {
	t := time.Now()
	ahead := c.ahead.Load()
	ms := c.start.UnixMilli() + t.Sub(c.start).Milliseconds() + ahead
	if d := t.UnixMilli() - ms; d > 1000 { // the clock was set, or the machine slept
		c.ahead.CompareAndSwap(ahead, ahead+d)
		ms += d
	}
	return ms
}

// CoreVersion returns the version of libzt's core, and an error that matches
// [ErrLibrary] if it is not the one this package was written for.
func CoreVersion() (string, error) {
	var major, minor, rev C.int
	ok := C.shim_version_ok(&major, &minor, &rev) != 0
	v := fmt.Sprintf("%d.%d.%d", major, minor, rev)
	if !ok {
		return v, fmt.Errorf("%w: its core is version %s, this program was built for %d.%d: install a libzt with that core, or use --node go",
			ErrLibrary, v, C.CORE_MAJOR, C.CORE_MINOR)
	}
	return v, nil
}

// New opens home and the UDP sockets and makes the node; what an operator can remedy is
// an error of [ztnode]. Run must be called to make it work, Close if it is not.
func New(cfg Config) (_ *Node, err error) {
	n := &Node{
		cfg: cfg, log: cfg.Logger, clock: &clock{start: time.Now()},
		free: make(chan *worker, 16), ready: make(chan struct{}), wake: make(chan struct{}, 1),
		fresh: map[ztnode.NetworkID]bool{}, groups: map[ztnode.NetworkID][]ztnode.Group{},
		certificates: certificates{known: map[ztnode.NetworkID]certificate{}},
	}
	n.nets.Store(&map[ztnode.NetworkID]*ztnode.Network{})
	n.inside.Store(&[]netip.Prefix{})
	if n.log == nil {
		n.log = slog.New(slog.DiscardHandler)
	}
	if n.info.Version, err = CoreVersion(); err != nil {
		return nil, err
	}
	if n.store, err = openStore(cfg.Home, cfg.Planet, n.log); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	if n.udp, err = cfg.OpenUDP(n.insideNetwork); err != nil {
		return nil, err
	}
	n.handle = cgo.NewHandle(n)
	if err := n.newCore(); err != nil {
		return nil, err
	}
	return n, n.joinStored()
}

func (n *Node) newCore() error {
	n.store.private = n.store.read(objectID{objPlanet, 0}) == nil // the built-in planet is not for the disk
	w := n.worker()
	defer n.release(w)
	var code C.int
	n.c = C.shim_new(C.uintptr_t(n.handle), C.int64_t(n.clock.now()), w.b, &code)
	n.store.mu.Lock()
	n.store.private = false
	n.store.mu.Unlock()
	if n.c == nil {
		return fmt.Errorf("start libzt: %w", codeError(int(code)))
	}
	if err := n.store.flush(); err != nil { // a new identity, before anybody sees it
		return err
	}
	var st C.core_status
	C.shim_status(n.c, &st)
	n.info.Address = fmt.Sprintf("%010x", uint64(st.address))
	n.info.Identity = C.GoString(st.public_identity)
	n.drain(w)
	return nil
}

func (n *Node) joinStored() error {
	for _, id := range n.store.ids(objMoon) {
		if err := n.Orbit(id, 0); err != nil {
			return err
		}
	}
	stored := n.store.ids(objNetwork)
	slices.Sort(stored)
	all := slices.Clone(n.cfg.Networks)
	for _, id := range stored {
		if !slices.Contains(all, ztnode.NetworkID(id)) {
			all = append(all, ztnode.NetworkID(id))
		}
	}
	room := min(len(all), ztnode.MaxNetworks)
	if left := all[room:]; len(left) > 0 {
		n.log.Error("home remembers more networks than a node can join: the rest is not joined", "limit", ztnode.MaxNetworks, "left_out", left,
			"remedy", "leave some and restart")
	}
	for _, id := range all[:room] {
		if err := n.Join(id); err != nil {
			return err
		}
	}
	return nil
}

// errorCode is a result of the core (chapter 05 §4).
type errorCode int

func (c errorCode) Error() string {
	switch c {
	case 100:
		return "out of memory"
	case 101:
		return "data store failed"
	case 102:
		return "internal error"
	case 1000:
		return "network not found"
	}
	return fmt.Sprintf("error code %d", int(c))
}

func codeError(code int) error {
	if code == 0 || code == 1 {
		return nil
	}
	return errorCode(code)
}

var errClosed = errors.New("the node is closed")

func (n *Node) worker() *worker {
	select {
	case w := <-n.free:
		return w
	default:
	}
	b := C.shim_batch_get()
	if b == nil {
		panic("bindings: out of memory")
	}
	return &worker{b: b, out: n.udp.NewSender()}
}

func (n *Node) release(w *worker) {
	select {
	case n.free <- w:
	default:
		C.shim_batch_put(w.b)
	}
}

// call lends f a worker during a call into the core and then sends what came of
// it.
func (n *Node) call(f func(*worker) C.int) error {
	w := n.worker()
	defer n.release(w)
	n.life.RLock()
	if n.closed {
		n.life.RUnlock()
		return errClosed
	}
	code := f(w)
	n.life.RUnlock()
	n.drain(w)
	return codeError(int(code))
}

// Close frees what New made. Run does it too.
func (n *Node) Close() error {
	n.once.Do(func() { n.ended = n.shutdown() })
	return n.ended
}

// shutdown follows chapter 05 §9.5: nobody is inside the core any more when it is
// deleted, and callbacks work until that is done.
func (n *Node) shutdown() error {
	n.life.Lock()
	n.closed = true
	n.life.Unlock()
	if n.c != nil {
		if since := time.Since(time.Unix(0, n.lastNDP.Load())); since < lateGrace {
			time.Sleep(lateGrace - since)
		}
		C.shim_delete(n.c)
	}
	var errs []error
	if n.udp != nil {
		errs = append(errs, n.udp.Close())
	}
	errs = append(errs, n.store.close())
	if n.handle != 0 {
		n.handle.Delete()
	}
	for {
		select {
		case w := <-n.free:
			C.shim_batch_put(w.b)
			continue
		default:
		}
		return errors.Join(errs...)
	}
}

// Run works until ctx ends, which is not an error, or something fails. When it
// returns all goroutines have ended and the sockets are closed.
func (n *Node) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.receive(ctx) })
	g.Go(func() error { return n.control(ctx) })
	g.Go(func() error { n.save(ctx); return nil })
	close(n.ready)
	err := g.Wait()
	return errors.Join(err, n.Close())
}

// Ready is closed when the node has begun to work.
func (n *Node) Ready() <-chan struct{} { return n.ready }

// save writes changed state objects to disk.
func (n *Node) save(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-n.store.wake:
		}
		if err := n.store.flush(); err != nil {
			n.log.Error("store state in home", "error", err)
		}
	}
}

func (n *Node) receive(ctx context.Context) error {
	var mu sync.Mutex // guards growth of the table only
	var table atomic.Pointer[[]*worker]
	table.Store(&[]*worker{})
	worker := func(i int) *worker {
		if t := *table.Load(); i < len(t) && t[i] != nil {
			return t[i]
		}
		mu.Lock()
		defer mu.Unlock()
		t := slices.Clone(*table.Load())
		for len(t) <= i {
			t = append(t, nil)
		}
		t[i] = n.worker()
		table.Store(&t)
		return t[i]
	}
	err := n.udp.Run(ctx,
		func(i int, socket uint32, from netip.AddrPort, datagram []byte) {
			n.collect(worker(i), socket, from, datagram)
		},
		func(i int) { n.feed(worker(i)) })
	for _, w := range *table.Load() {
		if w != nil {
			n.release(w)
		}
	}
	return err
}

// collect adds a datagram to what goes into the core with the next crossing.
func (n *Node) collect(w *worker, socket uint32, from netip.AddrPort, datagram []byte) {
	if w.b.in_n == C.IN_ENTRIES || int(w.b.in_used)+len(datagram) > C.IN_BYTES {
		n.feed(w)
	}
	d := (*C.shim_datagram)(unsafe.Pointer(&w.b.in[w.b.in_n]))
	putEndpoint(d, from)
	d.socket = C.int64_t(socket)
	if socket == 0 {
		d.socket = -1
	}
	d.off, d.len = w.b.in_used, C.uint32_t(copy(w.room(), datagram))
	w.b.in_used += d.len
	w.b.in_n++
}

// room is what is left of the bytes that go into the core.
func (w *worker) room() []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(&w.b.in_bytes[0])), C.IN_BYTES)[w.b.in_used:]
}

func putEndpoint(d *C.shim_datagram, e netip.AddrPort) {
	a := e.Addr().Unmap()
	b := (*[16]byte)(unsafe.Pointer(&d.a))
	d.v6 = 0
	if a.Is4() {
		four := a.As4()
		copy(b[:], four[:])
	} else {
		*b = a.As16()
		d.v6 = 1
	}
	d.port = C.uint16_t(e.Port())
}

// endpoint is the inverse of putEndpoint; ok is false for another family.
func endpoint(d *C.shim_datagram) (e netip.AddrPort, ok bool) {
	b := (*[16]byte)(unsafe.Pointer(&d.a))
	switch d.v6 {
	case 0:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[:4])), uint16(d.port)), true
	case 1:
		return netip.AddrPortFrom(netip.AddrFrom16(*b), uint16(d.port)), true
	}
	return e, false
}

// feed gives the core the datagrams that were collected.
func (n *Node) feed(w *worker) {
	now := C.int64_t(n.clock.now())
	for next := C.uint32_t(0); next < w.b.in_n; {
		n.life.RLock()
		if n.closed {
			n.life.RUnlock()
			break
		}
		next = C.shim_receive(n.c, w.b, now, next)
		n.life.RUnlock()
		n.drain(w)
	}
	w.b.in_n, w.b.in_used = 0, 0
}

// drain sends and delivers what the core put into the batch.
func (n *Node) drain(w *worker) {
	b := w.b
	out := unsafe.Slice((*byte)(unsafe.Pointer(&b.out_bytes[0])), C.OUT_BYTES)
	for i := range int(b.datagrams) {
		d := &b.datagram[i]
		to, ok := endpoint(d)
		if !ok {
			continue
		}
		data := out[d.off:][:d.len:d.len]
		socket := uint32(0)
		if d.socket > 0 {
			socket = uint32(d.socket)
		}
		if d.ttl != 0 {
			w.out.SendTTL(socket, to, data, int(d.ttl))
		} else {
			w.out.Send(socket, to, nil, data)
		}
	}
	if b.datagrams > 0 {
		w.out.Flush()
	}
	w.frames = n.deliver(b.frame[:b.frames], out, w.frames)
	b.datagrams, b.frames, b.out_used = 0, 0, 0
	n.addCounts(&b.counts)
}

func (n *Node) addCounts(c *C.shim_counts) {
	for i := range c.tx_bytes {
		if c.tx_bytes[i] != 0 {
			n.txBytes[i].Add(uint64(c.tx_bytes[i]))
		}
		if c.rx_bytes[i] != 0 {
			n.rxBytes[i].Add(uint64(c.rx_bytes[i]))
		}
	}
	add := func(to *atomic.Uint64, v C.uint64_t) {
		if v != 0 {
			to.Add(uint64(v))
		}
	}
	add(&n.txFragments, c.tx_fragments)
	add(&n.rxFragments, c.rx_fragments)
	add(&n.full, c.full)
	add(&n.refused, c.refused)
	*c = C.shim_counts{}
}

// deliver hands frames over, one call for each run of one network, and returns
// the list it used for that.
func (n *Node) deliver(frames []C.shim_frame, data []byte, list [][]byte) [][]byte {
	nets := *n.nets.Load()
	for i := 0; i < len(frames); {
		nwid := uint64(frames[i].nwid)
		mtu := defaultMTU
		if v := nets[ztnode.NetworkID(nwid)]; v != nil {
			mtu = v.MTU
		}
		list = list[:0]
		for ; i < len(frames) && uint64(frames[i].nwid) == nwid; i++ {
			f := &frames[i]
			if int(f.len) > mtu+ethLen {
				n.oversize.Add(1)
				continue
			}
			list = append(list, data[f.off:][:f.len:f.len])
		}
		if len(list) > 0 && n.cfg.OnFrames != nil {
			n.cfg.OnFrames(nwid, list)
		}
	}
	return list
}

// deliverLate hands over the frames of the core's own threads.
func (n *Node) deliverLate(l *C.shim_late) {
	n.life.RLock()
	if n.closed {
		n.life.RUnlock()
		return
	}
	C.shim_take_late(n.c, l)
	n.life.RUnlock()
	n.deliver(l.frame[:l.frames], unsafe.Slice((*byte)(unsafe.Pointer(&l.bytes[0])), C.LATE_BYTES), nil)
}

// WriteFrames sends Ethernet frames into a network. Frame i is
// bufs[i][offset:offset+sizes[i]]. The buffers are free again when it returns. It
// returns how many frames were accepted; the others are counted.
func (n *Node) WriteFrames(nwid uint64, bufs [][]byte, sizes []int, offset int) (int, error) {
	net := (*n.nets.Load())[ztnode.NetworkID(nwid)]
	if net == nil {
		n.noNetwork.Add(uint64(len(bufs)))
		return 0, nil
	}
	w := n.worker()
	defer n.release(w)
	ok := 0
	for i, b := range bufs {
		f := b[offset:][:sizes[i]]
		switch {
		case len(f) < ethLen || len(f) > net.MTU+ethLen:
			n.oversize.Add(1) // the core would send it (chapter 05 §3)
			continue
		case ztnode.MAC(f) == net.MAC:
			n.ownMAC.Add(1) // the core would keep the buffer (chapter 05 §8.4)
			continue
		}
		if w.b.in_n == C.IN_ENTRIES || int(w.b.in_used)+len(f) > C.IN_BYTES {
			ok += n.write(w, nwid)
		}
		if isNDP(f) {
			n.lastNDP.Store(time.Now().UnixNano())
		}
		e := (*C.shim_frame)(unsafe.Pointer(&w.b.in[w.b.in_n]))
		e.off, e.len = w.b.in_used, C.uint32_t(copy(w.room(), f))
		w.b.in_used += e.len
		w.b.in_n++
	}
	return ok + n.write(w, nwid), nil
}

// isNDP reports whether a frame is ICMPv6 without extension headers.
func isNDP(f []byte) bool {
	return len(f) > ethLen+40 && f[12] == 0x86 && f[13] == 0xdd && f[ethLen+6] == 58
}

// write gives the core the frames that were collected.
func (n *Node) write(w *worker, nwid uint64) int {
	now := C.int64_t(n.clock.now())
	refused := n.refused.Load()
	count := int(w.b.in_n)
	for next := C.uint32_t(0); next < w.b.in_n; {
		n.life.RLock()
		if n.closed {
			n.life.RUnlock()
			count = int(next)
			break
		}
		next = C.shim_write(n.c, w.b, now, C.uint64_t(nwid), next)
		n.life.RUnlock()
		n.drain(w)
	}
	w.b.in_n, w.b.in_used = 0, 0
	return max(0, count-int(n.refused.Load()-refused))
}
