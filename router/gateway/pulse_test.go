package gateway

import (
	"errors"
	"testing"
	"time"

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

// TestClockJump: steps are told for a while, and slow drift isn't.
func TestClockJump(t *testing.T) {
	at := time.Now()
	for name, tt := range map[string]struct {
		wall, real time.Duration
		ok         bool
	}{
		"none":          {time.Second, time.Second, true},
		"adjusted":      {900 * time.Millisecond, time.Second, true},
		"forward":       {time.Hour, time.Second, false},
		"back":          {-time.Hour, time.Second, false},
		"a day of rest": {24 * time.Hour, time.Second, false},
	} {
		var c clockWatch
		c.note(at, tt.wall, tt.real)
		if got := c.check(at.Add(time.Minute)); got.OK != tt.ok || !tt.ok && got.Severity != control.Degraded {
			t.Errorf("%s: %+v", name, got)
		}
		if got := c.check(at.Add(clockSettles)); !got.OK {
			t.Errorf("%s: never forgotten: %+v", name, got)
		}
	}
}
