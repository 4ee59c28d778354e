package clock_test

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"

	"ztgate/zerotier/internal/clock"
	"ztgate/zerotier/simnet"
)

func TestWatch(t *testing.T) {
	start := time.Now()
	for _, tt := range []struct {
		name        string
		wall, sleep time.Duration // besides 500 ms that passed
		boot        bool
		slept, by   time.Duration
		said        string
	}{
		{"nothing", 0, 0, true, 0, 0, ""},
		{"corrected", -900 * time.Millisecond, 0, true, 0, 0, ""},
		{"back", -time.Hour, 0, true, 0, -time.Hour, "the wall clock went back"},
		{"ahead", 24 * time.Hour, 0, true, 0, 24 * time.Hour, "the wall clock went ahead"},
		{"sleep", 0, 8 * time.Hour, true, 8 * time.Hour, 0, "the host slept"},
		{"sleep that can't be told", 0, 8 * time.Hour, false, 0, 8 * time.Hour, "the wall clock went ahead"},
		{"sleep, and set back", -time.Hour, 8 * time.Hour, true, 8 * time.Hour, -time.Hour, "the wall clock went back"},
	} {
		var log bytes.Buffer
		first := clock.Reading{Now: start}
		next := clock.Reading{Now: simnet.SetWall(start.Add(500*time.Millisecond), tt.wall+tt.sleep)}
		if tt.boot {
			first.Boot, next.Boot = time.Minute, time.Minute+500*time.Millisecond+tt.sleep
		}
		w := clock.NewWatch(first, slog.New(slog.NewTextHandler(&log, nil)))
		slept, set := w.Look(next)
		if slept != tt.slept || set != (tt.by != 0) || w.Jump().By != tt.by || !strings.Contains(log.String(), tt.said) {
			t.Errorf("%s: slept %v, set %v by %v; %s", tt.name, slept, set, w.Jump().By, log.String())
		}
		log.Reset()
		next.Now, next.Boot = next.Now.Add(time.Second), next.Boot+time.Second
		if _, set := w.Look(next); set || log.Len() > 0 {
			t.Errorf("%s: said again: %s", tt.name, log.String())
		}
	}
}

func TestRead(t *testing.T) {
	w := clock.NewWatch(clock.Read(), slog.New(slog.DiscardHandler))
	if slept, set := w.Look(clock.Read()); slept != 0 || set {
		t.Errorf("slept %v, set %v", slept, set)
	}
}
