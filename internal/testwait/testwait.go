// Package testwait waits in tests for what other goroutines, processes and hosts
// bring about, where there is nothing to receive from and no clock of the test's
// own. Inside a testing/synctest bubble it waits on the bubble's clock.
package testwait

import (
	"runtime"
	"testing"
	"time"
)

// Pauses between two looks: short at first, since most things happen soon.
const (
	firstPause = 20 * time.Microsecond
	longPause  = 20 * time.Millisecond
)

// Poll calls cond until it holds, or for at most timeout, and reports whether it
// does. It calls cond at least once.
func Poll(timeout time.Duration, cond func() bool) bool {
	pause := firstPause
	for end := time.Now().Add(timeout); !cond(); pause = min(2*pause, longPause) {
		if time.Now().After(end) {
			return false
		}
		time.Sleep(pause)
	}
	return true
}

// For fails the test when cond does not hold within timeout. what ends the
// sentence "waited for".
func For(t testing.TB, timeout time.Duration, what string, cond func() bool) {
	t.Helper()
	if !Poll(timeout, cond) {
		t.Fatalf("waited %v for %s", timeout, what)
	}
}

// Try calls f until it returns no error, or for at most timeout, and returns its
// last error.
func Try(timeout time.Duration, f func() error) (err error) {
	Poll(timeout, func() bool { err = f(); return err == nil })
	return err
}

// NoError fails the test when f has not returned without an error within timeout.
func NoError(t testing.TB, timeout time.Duration, f func() error) {
	t.Helper()
	if err := Try(timeout, f); err != nil {
		t.Fatalf("after %v: %v", timeout, err)
	}
}

// Goroutines fails the test when more goroutines than before are left after a few
// seconds, and shows them all.
func Goroutines(t testing.TB, before int) {
	t.Helper()
	if Poll(5*time.Second, func() bool { return runtime.NumGoroutine() <= before }) {
		return
	}
	stacks := make([]byte, 1<<20)
	t.Errorf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, stacks[:runtime.Stack(stacks, true)])
}
