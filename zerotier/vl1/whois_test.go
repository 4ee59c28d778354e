package vl1

import (
	"testing"
	"time"

	"ztgate/zerotier/identity"
)

func TestQuestions(t *testing.T) {
	q := questions{m: make(map[identity.Address]question)}
	if !q.room(1) || !q.due(1, t0) {
		t.Fatal("the first question is refused")
	}
	q.want(1, t0)
	if !q.due(1, t0) {
		t.Error("a question that could not be asked isn't due")
	}
	q.asked(1, t0)
	for _, tt := range []struct {
		after time.Duration
		due   bool
	}{{0, false}, {whoisPacing - 1, false}, {whoisPacing, true}} {
		if got := q.due(1, t0+int64(tt.after)); got != tt.due {
			t.Errorf("after %v: due %v", tt.after, got)
		}
	}
	for a := identity.Address(2); len(q.m) < maxWhois; a++ {
		q.want(a, t0)
	}
	if !q.room(1) || q.room(99999) {
		t.Error("a full table takes others than those it has")
	}
	if q.answered(1); !q.room(99999) {
		t.Error("an answer makes no room")
	}
	q.asked(2, t0+int64(whoisPacing))
	if q.expire(t0 + 2*int64(whoisPacing)); len(q.m) != 1 || q.m[2].last == 0 {
		t.Errorf("%d questions are left, want the one repeated", len(q.m))
	}
}
