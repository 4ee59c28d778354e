package zerotier

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl1"
)

const (
	keepEvery = 30 * time.Second
	keepRound = 256 // files written in a round
)

// keeper writes new peers, and new endpoints of peers, to the cache while the node runs.
// A node that is killed knows them after its restart, and needs no HELLO, for which real
// members of a root take minutes (chapter 02 §4.6).
type keeper struct {
	store func(vl1.PeerRecord)
	kept  map[identity.Address][]netip.AddrPort // of those in the latest list
}

// run works until ctx ends.
func (k *keeper) run(ctx context.Context, list func() []vl1.PeerRecord) {
	t := time.NewTicker(keepEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			k.keep(list())
		}
	}
}

// keep stores the peers of a list that were not in the one before, or not with all of
// their endpoints. What is too much
// for a round waits for the next.
func (k *keeper) keep(list []vl1.PeerRecord) {
	now := make(map[identity.Address][]netip.AddrPort, len(list))
	written := 0
	for _, r := range list {
		a := r.Identity.Address()
		old, ok := k.kept[a]
		fresh := !ok || slices.ContainsFunc(r.Endpoints, func(ep netip.AddrPort) bool { return !slices.Contains(old, ep) })
		switch {
		case fresh && written < keepRound:
			written++
			k.store(r)
			now[a] = r.Endpoints
		case ok:
			now[a] = old
		}
	}
	k.kept = now
}
