package vl1

import (
	"net/netip"
	"testing"
	"time"

	"ztgate/internal/rate"
	"ztgate/zerotier/identity"
)

func newStrangers() *strangers { return &strangers{answers: rate.NewTable[netip.Addr](answerSources)} }

// count returns how many times f may be done at once.
func count(f func(i int) bool) (n int) {
	for i := range 100_000 {
		if !f(i) {
			break
		}
		n++
	}
	return n
}

func TestStrangerLimits(t *testing.T) {
	addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 1}) }
	for _, tt := range []struct {
		name string
		may  func(s *strangers, i int) bool
		want int
	}{
		{"key agreements of one network", func(s *strangers, _ int) bool { return s.mayAgree(t0, addr(0)) }, networkBurst},
		{"key agreements in all", func(s *strangers, i int) bool { return s.mayAgree(t0, addr(i)) }, agreeBurst},
		{"questions", func(s *strangers, _ int) bool { return s.mayAsk(t0) }, strangeBurst},
		{"answers to one address", func(s *strangers, _ int) bool { return s.mayAnswer(t0, addr(0)) }, answerBurst},
		{"checks on a worker", func(s *strangers, _ int) bool { return s.check(t0, true, true) == checkHere }, inlineBurst},
	} {
		s := newStrangers()
		if got := count(func(i int) bool { return tt.may(s, i) }); got != tt.want {
			t.Errorf("%s: %d at once, want %d", tt.name, got, tt.want)
		}
	}
}

func TestStrangerChecks(t *testing.T) {
	s := newStrangers()
	for range inlineBurst {
		s.check(t0, true, true)
	}
	for i, tt := range []struct {
		background, room, finish bool
		want                     checking
	}{
		{true, false, false, checkRefused}, // there is no room to hold the HELLO
		{true, true, false, checkBackground},
		{true, true, false, checkRefused}, // one runs
		{false, true, false, checkHere},
		{true, true, true, checkBackground},
	} {
		if tt.finish {
			s.checked()
		}
		if got := s.check(t0, tt.background, tt.room); got != tt.want {
			t.Errorf("check %d: %d, want %d", i, got, tt.want)
		}
	}
	if got := s.check(t0+int64(inlineEvery), true, true); got != checkHere {
		t.Errorf("a second later: %d", got)
	}
}

func TestHints(t *testing.T) {
	h := hints{m: make(map[identity.Address]hint)}
	for a := range identity.Address(2 * maxHints) {
		h.add(a, hint{born: t0})
	}
	if len(h.m) != maxHints {
		t.Errorf("%d hints, want %d", len(h.m), maxHints)
	}
	for _, tt := range []struct {
		a     identity.Address
		after time.Duration
		want  bool
	}{
		{0, 0, true}, {0, 0, false}, {1, queueTimeout, false}, {1, 0, false}, {9999, 0, false},
	} {
		if _, got := h.take(tt.a, t0+int64(tt.after)); got != tt.want {
			t.Errorf("hint for %s after %v: %v", tt.a, tt.after, got)
		}
	}
	if h.expire(t0 + int64(queueTimeout)); len(h.m) != 0 {
		t.Errorf("%d old hints", len(h.m))
	}
}

func TestIntroductions(t *testing.T) {
	i := introductions{m: make(map[pair]int64)}
	k := pair{1, 2}
	if !i.due(k, t0) {
		t.Error("the first is not due")
	}
	i.note(k, t0)
	if i.due(k, t0+int64(introduceEvery)-1) || !i.due(k, t0+int64(introduceEvery)) {
		t.Error("the next is not due after its time")
	}
	for a := identity.Address(10); len(i.m) < maxIntroductions; a++ {
		i.note(pair{1, a}, t0)
	}
	if i.due(pair{3, 4}, t0) {
		t.Error("a full table takes another pair")
	}
	if i.expire(t0 + int64(introduceEvery)); len(i.m) != 0 {
		t.Errorf("%d old introductions", len(i.m))
	}
}
