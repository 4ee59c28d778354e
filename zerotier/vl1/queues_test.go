package vl1

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"ztgate/zerotier/identity"
)

const t0 = int64(time.Hour) // a core's clock at its start

func TestOutQueue(t *testing.T) {
	for _, tt := range []struct {
		name     string
		to       []identity.Address // packets queued before
		dst      identity.Address
		ok, lost bool
		left     int
	}{
		{"empty", nil, 1, true, false, 1},
		{"room for one more of a peer", repeat(1, maxOutQueuePeer-1), 1, true, false, maxOutQueuePeer},
		{"too many of one peer", repeat(1, maxOutQueuePeer), 1, false, true, maxOutQueuePeer},
		{"another peer has room", repeat(1, maxOutQueuePeer), 2, true, false, maxOutQueuePeer + 1},
		{"the oldest goes", numbered(100, maxOutQueue), 1, true, true, maxOutQueue},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var q outQueue
			for _, a := range tt.to {
				q.add(queued{dst: a, born: t0})
			}
			payload := []byte("x")
			if ok, lost := q.add(queued{dst: tt.dst, payload: payload, born: t0}); ok != tt.ok || lost != tt.lost {
				t.Errorf("ok %v, lost %v, want %v, %v", ok, lost, tt.ok, tt.lost)
			}
			if payload[0] = 'y'; tt.ok && string(q.list[len(q.list)-1].payload) != "x" {
				t.Error("the payload was not copied")
			}
			if len(q.list) != tt.left {
				t.Errorf("%d packets, want %d", len(q.list), tt.left)
			}
			all := len(q.list)
			mine := q.take(tt.dst)
			if len(q.take(tt.dst)) != 0 || len(mine)+len(q.list) != all {
				t.Error("packets were taken twice or lost")
			}
			if q.expire(t0 + int64(queueTimeout)); len(q.list) != 0 {
				t.Errorf("%d packets outlive their time", len(q.list))
			}
		})
	}
}

func TestHeldQueue(t *testing.T) {
	source := Source{Endpoint: netip.MustParseAddrPort("192.0.2.1:1")}
	var h heldQueue
	for i, want := range []struct{ ok, lost bool }{{true, false}, {true, false}, {false, true}} {
		if ok, lost := h.add(heldPacket{from: 1, src: source, born: t0, asked: 1}); ok != want.ok || lost != want.lost {
			t.Errorf("packet %d: ok %v, lost %v", i, ok, lost)
		}
	}
	for i := identity.Address(2); !h.full(); i++ {
		h.add(heldPacket{from: i, src: source, born: t0, asked: 1})
	}
	if ok, lost := h.add(heldPacket{from: 1000, src: source, born: t0, asked: 1}); !ok || !lost || len(h.list) != maxHeld {
		t.Errorf("of a full queue: ok %v, lost %v, %d packets", ok, lost, len(h.list))
	}
	if len(h.take(1)) != 1 || len(h.take(1)) != 0 {
		t.Error("not one packet of the first sender is left")
	}
	h.addChecked(heldPacket{from: 7, src: source, born: t0})
	if h.dropChecked(7); len(h.take(7)) != 1 {
		t.Error("other packets of a refused sender are to stay")
	}
	h.list = h.list[:1]
	h.addChecked(heldPacket{from: 8, src: source, born: t0})
	from := h.list[0].from
	for _, tt := range []struct {
		after time.Duration
		ask   []identity.Address
		left  int
	}{
		{0, nil, 2},
		{time.Second, []identity.Address{from}, 2},
		{2 * time.Second, nil, 2},
		{3 * time.Second, []identity.Address{from}, 2},
		{4 * time.Second, nil, 2},
		{queueTimeout, nil, 0},
	} {
		if got := h.due(t0 + int64(tt.after)); !slices.Equal(got, tt.ask) || len(h.list) != tt.left {
			t.Errorf("after %v: asks for %v with %d held, want %v with %d", tt.after, got, len(h.list), tt.ask, tt.left)
		}
	}
}

func TestRetryQueue(t *testing.T) {
	a, b := new(Peer), new(Peer)
	var r retryQueue
	for i := range maxRetryPeer + 1 {
		if got := r.add(retryPacket{from: a, born: t0}); got != (i < maxRetryPeer) {
			t.Errorf("packet %d of a peer: %v", i, got)
		}
	}
	if !r.add(retryPacket{from: b, born: t0 + 1}) {
		t.Error("no room for another peer's")
	}
	if got := r.take(t0, b); len(got) != 1 || got[0].from != b {
		t.Errorf("took %d packets of the other peer", len(got))
	} else {
		r.putBack(got[0])
	}
	if got := r.take(t0+int64(queueTimeout), nil); len(got) != 1 {
		t.Errorf("%d packets are young enough, want 1", len(got))
	}
	for i := range maxRetry + 1 {
		if got := r.add(retryPacket{from: new(Peer), born: t0}); got != (i < maxRetry) {
			t.Errorf("packet %d: %v", i, got)
		}
	}
}

func repeat(a identity.Address, n int) []identity.Address {
	return slices.Repeat([]identity.Address{a}, n)
}

func numbered(from identity.Address, n int) (list []identity.Address) {
	for i := range n {
		list = append(list, from+identity.Address(i))
	}
	return list
}
