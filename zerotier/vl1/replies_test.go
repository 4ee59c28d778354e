package vl1

import (
	"testing"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
)

func TestReplies(t *testing.T) {
	r := replies{m: make(map[packet.ID]*expectation)}
	e := &expectation{peer: 1, verb: packet.VerbEcho, sent: t0}
	r.expect(5, e)
	for _, tt := range []struct {
		name  string
		id    packet.ID
		from  identity.Address
		verb  packet.Verb
		after time.Duration
		want  *expectation
	}{
		{"in time", 5, 1, packet.VerbEcho, expectTimeout - 1, e},
		{"of another packet", 6, 1, packet.VerbEcho, 0, nil},
		{"of another peer", 5, 2, packet.VerbEcho, 0, nil},
		{"to another verb", 5, 1, packet.VerbHello, 0, nil},
		{"too late", 5, 1, packet.VerbEcho, expectTimeout, nil},
	} {
		if got := r.find(tt.id, tt.from, tt.verb, t0+int64(tt.after)); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
	for i := range packet.ID(2 * maxExpected) {
		r.expect(100+i, &expectation{sent: t0})
	}
	if len(r.m) != maxExpected || len(r.log) != maxExpected {
		t.Errorf("%d requests and %d in order, want %d", len(r.m), len(r.log), maxExpected)
	}
	if r.find(100+2*maxExpected-1, 0, 0, t0) == nil {
		t.Error("the latest request is not the one that stays")
	}
	r.expect(1, &expectation{sent: t0 + int64(expectTimeout)})
	if len(r.m) != 1 {
		t.Errorf("%d requests, want only the one that isn't overdue", len(r.m))
	}
	if r.expire(t0 + 2*int64(expectTimeout)); len(r.m) != 0 || len(r.log) != 0 {
		t.Errorf("%d requests are left", len(r.m))
	}
}

func TestRequests(t *testing.T) {
	r := requests{m: make(map[packet.ID]struct{})}
	for id := range packet.ID(3 * maxRequests) {
		r.add(id)
	}
	if len(r.m) != maxRequests || len(r.log) != maxRequests || r.has(2*maxRequests-1) || !r.has(2*maxRequests) || !r.has(3*maxRequests-1) {
		t.Errorf("%d requests, want the latest %d", len(r.m), maxRequests)
	}
}
