package nat

import (
	"sync"
	"time"

	"ztgate/netstack/internal/ipkt"
)

const (
	maxFragKeys  = 4096
	fragLifetime = int64(30 * time.Second) // RFC 791: reassembly may take that long
)

// fragKey names a fragmented packet.
type fragKey struct {
	src, dst [16]byte
	id       uint32
	proto    uint8
	side     Side
}

type fragEntry struct {
	flow    *Flow
	forward bool
	born    int64
}

// fragTable remembers to which flow the later fragments of a packet belong. Later
// fragments that come before the first are not found: the sender repeats them.
type fragTable struct {
	mu sync.Mutex
	m  map[fragKey]fragEntry
}

func (t *fragTable) init() { t.m = make(map[fragKey]fragEntry) }

func fragKeyOf(side Side, v *ipkt.View) fragKey {
	return fragKey{v.Src, v.Dst, v.FragID, v.Proto, side}
}

func (t *fragTable) note(now int64, side Side, v *ipkt.View, f *Flow, forward bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.m) < maxFragKeys {
		t.m[fragKeyOf(side, v)] = fragEntry{f, forward, now}
	}
}

func (t *fragTable) find(now int64, side Side, v *ipkt.View) (*Flow, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, ok := t.m[fragKeyOf(side, v)]
	if !ok || now-e.born >= fragLifetime || e.flow.Dead() {
		return nil, false
	}
	return e.flow, e.forward
}

func (t *fragTable) expire(now int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, e := range t.m {
		if now-e.born >= fragLifetime {
			delete(t.m, k)
		}
	}
}

// NoteFragment remembers the flow of a first fragment that opened it.
func (t *Table) NoteFragment(now int64, side Side, v *ipkt.View, f *Flow, forward bool) {
	if v.Fragment && v.First {
		t.frags.note(now, side, v, f, forward)
	}
}
