package watch

import "testing"

func TestWatchers(t *testing.T) {
	var w Watchers
	w.Notify() // nobody there
	a, endA := w.Watch()
	b, endB := w.Watch()
	defer endB()
	w.Notify()
	w.Notify() // one value stands for both
	for _, ch := range []<-chan struct{}{a, b} {
		<-ch
		select {
		case <-ch:
			t.Error("a second value")
		default:
		}
	}
	endA()
	w.Notify()
	<-b
	select {
	case <-a:
		t.Error("a value after the end")
	default:
	}
}
