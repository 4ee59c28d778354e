package vl1

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"ztgate/zerotier/identity"
)

// boundsCore is a core, and peers of it that were last heard one after the other.
func boundsCore(t *testing.T, change func(*Config), peers int) (*Core, []*Peer) {
	t.Helper()
	id := testIdentity(t)
	cfg := Config{Identity: id, Upper: noUpper{}, Start: time.Unix(1, 0)}
	if change != nil {
		change(&cfg)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	var out []*Peer
	for i := range peers {
		other, err := identity.Parse(identity.Address(0x1000000000+i).String() + id.SecretString()[10:])
		if err != nil {
			t.Fatal(err)
		}
		p, err := c.addPeer(other, t0+int64(i))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, p)
	}
	return c, out
}

// TestPeersAreBounded: peers that have proven nothing make room, the longest silent
// first; a full table takes no more of them, and no identity that is answered for.
func TestPeersAreBounded(t *testing.T) {
	c, peers := boundsCore(t, nil, 20)
	member, contact := peers[0], peers[1]
	member.lastTrust.Store(t0)
	c.KeepContact([]identity.Address{contact.addr})
	roots := int(c.count.Load()) - len(peers)
	c.mu.Lock()
	c.evictLocked(t0+20, 5)
	c.mu.Unlock()
	var left []*Peer
	for _, p := range peers {
		if c.Peer(p.addr) != nil {
			left = append(left, p)
		}
	}
	if want := append([]*Peer{member, contact}, peers[15:]...); !slices.Equal(left, want) || c.untrusted != 5 || int(c.count.Load()) != roots+len(want) {
		t.Errorf("%d of 20 peers are left, %d of them unproven", len(left), c.untrusted)
	}
	now := t0 + int64(time.Minute)
	for _, tt := range []struct {
		name        string
		count       int64
		untrusted   int
		evictedLast int64
		want        bool
	}{
		{"few", maxUntrustedPeers - 1, maxUntrustedPeers - 1, now, true},
		{"many members", maxUntrustedPeers, 100, now, true},
		{"many unproven", maxUntrustedPeers, maxUntrustedPeers, now, false},
		{"many unproven, and some make room", maxUntrustedPeers, maxUntrustedPeers, now - int64(time.Second), true},
		{"full", maxPeers, 100, now, false},
	} {
		c.count.Store(tt.count)
		c.untrusted, c.lastEvict = tt.untrusted, tt.evictedLast
		if got := c.roomForPeer(now); got != tt.want {
			t.Errorf("%s: room %v, want %v", tt.name, got, tt.want)
		}
	}
}

// TestIdentitiesAreBounded: a full table learns nobody from what a root answers.
func TestIdentitiesAreBounded(t *testing.T) {
	c, peers := boundsCore(t, nil, 1)
	learned := peers[0].id
	c.removePeer(peers[0])
	root := c.Peer(c.Upstreams()[0])
	w := c.NewWorker().Begin(nil, time.Unix(2, 0))
	for _, full := range []bool{true, false} {
		before := c.count.Load()
		if full {
			c.count.Store(maxPeers)
		}
		c.okWhois(w, root, learned.AppendBinary(nil), &expectation{asked: learned.Address()})
		if got := c.Peer(learned.Address()) != nil; got == full {
			t.Errorf("full %v: learned %v", full, got)
		}
		c.count.Store(before)
	}
	if n := c.Stats().RejectedBy(RejectPeerLimit); n != 1 {
		t.Errorf("%d refused for the limit", n)
	}
}

// TestPathsAreBounded: a peer that is heard from ever new places has few paths, the latest.
func TestPathsAreBounded(t *testing.T) {
	c, peers := boundsCore(t, nil, 1)
	p := peers[0]
	at := func(i int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)}), 9993)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	const tries = 10 * maxPaths
	for i := range tries {
		c.learnPathLocked(p, 1, at(i), t0+int64(i+1)*int64(time.Millisecond))
	}
	if len(p.paths) != maxPaths {
		t.Errorf("%d paths, want %d", len(p.paths), maxPaths)
	}
	for _, pa := range p.paths {
		if i := int(pa.ep.Addr().As4()[2])<<8 | int(pa.ep.Addr().As4()[3]); i < tries-maxPaths {
			t.Errorf("path %d of %d is left", i, tries)
		}
	}
}

// TestRevivedAreBounded: no more of the cache is asked for than may be greeted, once.
func TestRevivedAreBounded(t *testing.T) {
	asked := []int{}
	c, _ := boundsCore(t, func(cfg *Config) {
		cfg.StoredPeers = func(most int) []identity.Address { asked = append(asked, most); return nil }
	}, 0)
	for range 3 {
		c.revivePeers(c.NewWorker())
	}
	if !slices.Equal(asked, []int{64}) {
		t.Errorf("asked for %d of the cache", asked)
	}
}

// TestUnprovenInAll: what is sent to all addresses together that have proven nothing is
// bounded too, whatever came from them.
func TestUnprovenInAll(t *testing.T) {
	c := newCredit()
	sent := 0
	for i := range 4096 {
		a := netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)})
		c.add(t0, a, maxCredit)
		if c.take(t0, a, maxCredit) {
			sent += maxCredit
		}
	}
	if sent != unprovenBurst {
		t.Errorf("%d bytes at once, want %d", sent, unprovenBurst)
	}
	a := netip.MustParseAddr("198.18.99.1")
	if c.add(t0+int64(time.Second)/2, a, maxCredit); !c.take(t0+int64(time.Second)/2, a, maxCredit) {
		t.Error("nothing half a second later")
	}
}
