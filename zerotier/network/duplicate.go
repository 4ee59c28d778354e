package network

import (
	"time"

	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

// Another node with our identity, say of a copied home, has the same address and the same
// keys, and others send to whichever of the two they heard last. What tells is that a
// controller answers requests that we never sent. Only its answers count: they are signed, and
// it could put us out of the network anyway, while a member might lie. And they count only if
// they are newer than all configurations that we have had since the start: what was on its
// way to us before a restart, came late, or was recorded and is sent again is older.
const (
	duplicateSigns = 3
	duplicateSpan  = 5 * time.Second // from the first to the last of them
	duplicateAfter = 5               // refreshes of the configuration without a sign: it is gone
)

// duplicate is what a network knows of another node with our identity.
type duplicate struct {
	timestamp   int64 // of the latest configuration that it got
	signs       int
	first, last int64 // instants
	noticed     bool
}

// note counts a configuration that another node asked for.
func (d *duplicate) note(timestamp, t int64, lifetime time.Duration) {
	if d.signs > 0 && since(t, d.last) >= lifetime {
		*d = duplicate{}
	}
	if d.signs == 0 {
		d.first = t
	}
	d.signs++
	d.timestamp, d.last = timestamp, t
	d.noticed = d.noticed || d.signs >= duplicateSigns && since(t, d.first) >= duplicateSpan
}

// receiveForeign looks at a chunk of a configuration that answers none of our requests.
func (l *Layer) receiveForeign(w *vl1.Worker, from *vl1.Peer, b []byte) {
	chunk, err := vl2.ParseChunk(b)
	if err != nil {
		l.stats.malformed.Add(1)
		return
	}
	n := l.net(chunk.Network)
	if n == nil || from.Address() != n.id.Controller() || n.hasChunk(w.Now(), chunk) {
		return
	}
	work, ok := l.afford(w, from, 1)
	if !ok {
		return
	}
	genuine := chunk.Verify(from.Identity())
	work.Done()
	if !genuine {
		l.stats.badSignatures.Add(1)
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	dict, _ := n.updates.Add(w.Now(), chunk)
	if dict == nil {
		return
	}
	s := n.snap.Load()
	cfg, err := vl2.DecodeNetworkConfig(dict)
	if err != nil || cfg.Member != l.self || s.cfg == nil || s.updated.IsZero() || cfg.Timestamp <= max(s.cfg.Timestamp, n.duplicate.timestamp) {
		return
	}
	n.duplicate.note(cfg.Timestamp, l.instant(w.Now()), n.duplicateLifetime(s))
}

// duplicateLifetime is how long a sign of another node with our identity counts.
func (n *joined) duplicateLifetime(s *state) time.Duration { return duplicateAfter * n.pace(s).refresh }

// duplicateLocked returns when another node with our identity was noticed last, the zero
// time if it wasn't lately.
func (n *joined) duplicateLocked(s *state) time.Time {
	look := n.l.look.Load()
	if !n.duplicate.noticed || look == nil || since(n.l.instant(*look), n.duplicate.last) >= n.duplicateLifetime(s) {
		return time.Time{}
	}
	return n.l.timeOf(n.duplicate.last)
}
