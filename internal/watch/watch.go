// Package watch tells several goroutines that something has changed.
package watch

import "sync"

// Watchers are those who want to know. The zero value has none. It is safe for
// concurrent use.
type Watchers struct {
	mu sync.Mutex
	m  map[chan struct{}]struct{}
}

// Watch returns a channel that gets a value after any change, and a function that
// ends it.
func (w *Watchers) Watch() (<-chan struct{}, func()) {
	ch := make(chan struct{}, 1)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.m == nil {
		w.m = make(map[chan struct{}]struct{})
	}
	w.m[ch] = struct{}{}
	return ch, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.m, ch)
	}
}

// Notify says that something has changed. It doesn't wait.
func (w *Watchers) Notify() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for ch := range w.m {
		select {
		case ch <- struct{}{}:
		default: // a value is waiting already
		}
	}
}
