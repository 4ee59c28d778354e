// Package clock notices what happens to a host's clocks: that the wall clock was set, and
// that the host slept, while the monotonic clock stood still.
package clock

import (
	"log/slog"
	"time"
)

// tolerance is what clocks may drift apart between two looks at them, and adjtime may
// correct, without a word.
const tolerance = 2 * time.Second

// Reading is one look at the clocks.
type Reading struct {
	Now  time.Time     // wall clock and monotonic clock
	Boot time.Duration // since the host was started, with the time it slept; 0 = can't be told
}

// Jump says how the wall clock was set.
type Jump struct {
	At time.Time     // when it was noticed, by the clock as it was set
	By time.Duration // below zero: back
}

// Watch compares looks at the clocks. It is not safe for concurrent use.
type Watch struct {
	last Reading
	jump Jump
	log  *slog.Logger
}

// NewWatch begins with a look at the clocks.
func NewWatch(first Reading, log *slog.Logger) *Watch { return &Watch{last: first, log: log} }

// Look compares the clocks with the look before. It reports for how long the host slept, and
// whether the wall clock was set.
func (w *Watch) Look(r Reading) (slept time.Duration, set bool) {
	ran := r.Now.Sub(w.last.Now)
	wall := r.Now.Round(0).Sub(w.last.Now.Round(0))
	if r.Boot != 0 && w.last.Boot != 0 {
		slept = r.Boot - w.last.Boot - ran
	}
	if slept < tolerance {
		slept = 0
	}
	w.last = r
	if slept > 0 {
		w.log.Warn("the host slept", "for", slept.Round(time.Second))
	}
	by := wall - ran - slept
	if by.Abs() < tolerance {
		return slept, false
	}
	w.jump = Jump{At: r.Now, By: by}
	if by < 0 {
		w.log.Warn("the wall clock went back", "by", -by.Round(time.Second))
	} else {
		w.log.Warn("the wall clock went ahead", "by", by.Round(time.Second))
	}
	return slept, true
}

// Jump returns the latest jump of the wall clock, the zero value without one.
func (w *Watch) Jump() Jump { return w.jump }
