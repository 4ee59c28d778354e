package gateway

import (
	"errors"
	"testing"

	"ztgate/netstack"
	"ztgate/router/control"
)

// TestPulse: only a plane that doesn't take what is sent to it, or whose timers stand
// still, is called dead, and not before it had its chances.
func TestPulse(t *testing.T) {
	for name, tt := range map[string]struct {
		knock error
		step  netstack.Pulse // that a beat brings
		alive bool
	}{
		"works":              {nil, netstack.Pulse{Packets: 1, Rounds: 10}, true},
		"reads nothing":      {nil, netstack.Pulse{Rounds: 10}, false},
		"timers stand still": {nil, netstack.Pulse{Packets: 1}, false},
		"interface down":     {errors.New("network is down"), netstack.Pulse{Rounds: 10}, true},
	} {
		now := netstack.Pulse{Packets: 1, Rounds: 1}
		p := &pulse{read: func() netstack.Pulse { return now }, knock: func() error { return tt.knock }}
		for range beatsMissed {
			p.beat()
			if !p.alive() {
				t.Errorf("%s: dead too early", name)
			}
			now.Packets += tt.step.Packets
			now.Rounds += tt.step.Rounds
		}
		p.beat()
		if p.alive() != tt.alive || p.check().OK != tt.alive || !tt.alive && p.check().Severity != control.Down {
			t.Errorf("%s: alive %v, %+v", name, p.alive(), p.check())
		}
		now.Packets++
		now.Rounds++
		if p.beat(); !p.alive() {
			t.Errorf("%s: still dead", name)
		}
	}
}
