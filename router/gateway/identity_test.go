package gateway

import (
	"strings"
	"testing"
	"time"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/zerotier/ztnode"
)

// Whose controller stays silent is told what that may mean, once it isn't just slow.
func TestSilentController(t *testing.T) {
	const nwid = ztnode.NetworkID(0x8056c2e21c000001)
	now := time.Unix(1_800_000_000, 0)
	s := &service{}
	s.conf.Store(&config.Config{})
	for name, tt := range map[string]struct {
		unanswered int
		heard      time.Duration // ago, by the controller's node; 0 = never
		remedy     bool
		near       bool
	}{
		"at first":       {3, time.Second, false, false},
		"out of reach":   {20, 0, true, false},
		"heard long ago": {20, time.Hour, true, false},
		"within reach":   {20, time.Second, true, true},
	} {
		var peers []ztnode.Peer
		if tt.heard > 0 {
			peers = append(peers, ztnode.Peer{Address: "8056c2e21c", LastReceive: now.Add(-tt.heard)})
		}
		c := s.networkCheck([]ztnode.Network{{ID: nwid, Status: ztnode.StatusRequesting, Unanswered: tt.unanswered}}, "fcd8055969", peers, now)
		if c.Severity != control.Down || strings.Contains(c.Remedy, "another node may use this identity") != tt.remedy ||
			strings.Contains(c.Reason, "is within reach but answers no request") != tt.near {
			t.Errorf("%s: %+v", name, c)
		}
		// One that worked before: while the controller is out of reach it has more time.
		c = s.controllerCheck([]ztnode.Network{{ID: nwid, Status: ztnode.StatusOK, LastController: now.Add(-2 * time.Minute), Unanswered: tt.unanswered}}, peers, now)
		if (c.Severity == control.Degraded) != tt.near || strings.Contains(c.Remedy, "another node may use this identity") != tt.near {
			t.Errorf("%s, after it worked: %+v", name, c)
		}
	}
}
