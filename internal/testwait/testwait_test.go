package testwait

import (
	"errors"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestPoll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		calls := 0
		if !Poll(time.Minute, func() bool { calls++; return time.Since(start) >= time.Second }) {
			t.Error("gave up before the time was over")
		}
		if d := time.Since(start); d > time.Second+longPause || calls > 100 {
			t.Errorf("%d calls in %v", calls, d)
		}
		start = time.Now()
		if Poll(time.Minute, func() bool { return false }) {
			t.Error("never true, and yet it held")
		}
		if d := time.Since(start); d < time.Minute || d > time.Minute+longPause {
			t.Errorf("waited %v instead of a minute", d)
		}
		if !Poll(0, func() bool { return true }) {
			t.Error("what holds at once isn't seen without time")
		}
	})
}

func TestTry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		want := errors.New("not yet")
		if err := Try(time.Second, func() error { return want }); !errors.Is(err, want) {
			t.Errorf("Try = %v, want %v", err, want)
		}
		n := 0
		NoError(t, time.Second, func() error {
			if n++; n < 3 {
				return want
			}
			return nil
		})
		if n != 3 {
			t.Errorf("%d calls, want 3", n)
		}
	})
}

// failed keeps what a test would fail with.
type failed struct {
	testing.TB
	text string
}

func (f *failed) Helper() {}

func (f *failed) Errorf(format string, _ ...any) { f.text = format }

func TestGoroutines(t *testing.T) {
	before := runtime.NumGoroutine()
	end := make(chan struct{})
	go func() { <-end }()
	close(end)
	Goroutines(t, before)
	synctest.Test(t, func(t *testing.T) {
		var f failed
		Goroutines(&f, 0)
		if !strings.Contains(f.text, "goroutines") {
			t.Errorf("goroutines are left, and it says %q", f.text)
		}
	})
}
