package gateway

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/zerotier/ztnode"
)

// wellNode is a node with which nothing is wrong.
type wellNode struct{ Node }

func (wellNode) Info() ztnode.Info    { return ztnode.Info{Address: "fcd8055969", Online: true} }
func (wellNode) Peers() []ztnode.Peer { return nil }
func (wellNode) Networks() []ztnode.Network {
	return []ztnode.Network{{ID: 0x8056c2e21c000001, Status: ztnode.StatusOK, LastController: time.Now(),
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/24")}}}
}

// TestWalksAreBounded: a diagnosis asks so many targets at a time, and ends in time though
// none of them answers.
func TestWalksAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newService(&config.Config{}, nil, wellNode{}, time.Now())
		s.mode = control.ModeMember
		var mu sync.Mutex
		asked, asking, most := 0, 0, 0
		count := func(n int) {
			mu.Lock()
			defer mu.Unlock()
			asked, asking = asked+max(n, 0), asking+n
			most = max(most, asking)
		}
		s.echo = func(ctx context.Context, _ netip.Addr) (full, fits int, err error) {
			count(1)
			defer count(-1)
			<-ctx.Done()
			return 0, 0, ctx.Err()
		}
		s.targets.send = func(ctx context.Context, _ config.Target) (probed, error) { return probed{}, ctx.Err() }
		begun := time.Now()
		d, err := s.diagnose(t.Context(), control.DiagnosisRequest{Targets: slices.Repeat([]string{"tcp://10.0.0.10:443"}, maxTargets)})
		if err != nil || asked != maxTargets || most != maxWalks {
			t.Errorf("%d targets were asked, %d at a time, %v: %+v", asked, most, err, d.Links)
		}
		if took := time.Since(begun); took > 9*time.Second {
			t.Errorf("it took %v", took)
		}
	})
}
