package vl1

import (
	"net/netip"
	"runtime"
	"testing"
	"time"
	"weak"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/testvec"
	"ztgate/zerotier/packet"
)

type noUpper struct{}

func (noUpper) HandlePacket(*Worker, *Peer, packet.Packet, Source) (r Result) { return r }
func (noUpper) PeerLearned(*Worker, *Peer)                                    {}

// withWorker is an upper layer that holds a worker, as the network layer does.
type withWorker struct {
	noUpper
	w *Worker
}

func testIdentity(t *testing.T) *identity.Identity {
	var v struct {
		Valid []struct {
			Secret string `json:"text_secret"`
		}
	}
	testvec.Load(t, "identity.json", &v)
	id, err := identity.Parse(v.Valid[0].Secret)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// collected frees what is garbage until gone holds, or it never will.
func collected(gone func() bool) bool {
	for range 1000 {
		if runtime.GC(); gone() {
			return true
		}
		runtime.Gosched()
	}
	return false
}

// A core that nobody holds any more goes with its workers.
func TestCoreIsFreed(t *testing.T) {
	gone := func() weak.Pointer[Core] {
		upper := &withWorker{}
		c, err := New(Config{Identity: testIdentity(t), Upper: upper, Start: time.Unix(1, 0)})
		if err != nil {
			t.Fatal(err)
		}
		upper.w = c.NewWorker()
		return weak.Make(c)
	}()
	if !collected(func() bool { return gone.Value() == nil }) {
		t.Error("the core is still there")
	}
}

// Workers that nobody holds any more, e.g. because a pool dropped them, go, and
// what they counted stays.
func TestWorkersAreFreed(t *testing.T) {
	c, err := New(Config{Identity: testIdentity(t), Upper: noUpper{}, Start: time.Unix(1, 0)})
	if err != nil {
		t.Fatal(err)
	}
	const count = 100
	for range count {
		c.Receive(c.NewWorker().Begin(nil, time.Unix(2, 0)), 1, netip.AddrPort{}, []byte("x"))
	}
	left := func() int {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.workers)
	}
	if !collected(func() bool { return left() == 1 }) { // the timer's
		t.Errorf("%d workers left", left())
	}
	if s := c.Stats(); s.RxDatagrams != count || s.RejectedBy(RejectShort) != count {
		t.Errorf("%d datagrams counted, want %d", s.RxDatagrams, count)
	}
}
