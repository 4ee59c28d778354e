package budget

import (
	"testing"
	"time"

	"ztgate/zerotier/identity"
)

// spend asks for work at a rate for a second, each piece taking cost, and returns how
// long all of it took.
func spend(b *Budget, now *time.Duration, senders []Sender, perSecond int, k Kind, cost time.Duration) (total time.Duration) {
	t := int64(time.Hour)
	for i := range 10 * perSecond {
		t += int64(time.Second) / int64(perSecond)
		w, ok := b.Take(t, senders[i%len(senders)], k, 1)
		if !ok {
			continue
		}
		*now += cost
		total += cost
		w.Done()
	}
	return total
}

func crowd(n int) (out []Sender) {
	for i := range n {
		out = append(out, Sender{Address: identity.Address(i + 1)})
	}
	return out
}

func TestShares(t *testing.T) {
	for _, tt := range []struct {
		name    string
		senders []Sender
		kind    Kind
		cost    time.Duration
		most    time.Duration // in 10 s
	}{
		{"forged HELLOs", []Sender{{}}, Agreement, 100 * time.Microsecond, 500*time.Millisecond + unprovenBurst},
		{"on a slow machine", []Sender{{}}, Agreement, 400 * time.Microsecond, 500*time.Millisecond + unprovenBurst},
		{"identities", []Sender{{}}, Identity, 15 * time.Millisecond, 500*time.Millisecond + unprovenBurst},
		{"one stranger", crowd(1), Signature, 85 * time.Microsecond, 100*time.Millisecond + oneBurst},
		{"60 strangers", crowd(60), Signature, 85 * time.Microsecond, 500*time.Millisecond + provenBurst},
		{"a member", []Sender{{1, true}}, Signature, 85 * time.Microsecond, 500*time.Millisecond + memberBurst},
	} {
		var now time.Duration
		b := New(func() time.Duration { return now })
		got := spend(b, &now, tt.senders, 40_000, tt.kind, tt.cost)
		if got > tt.most+tt.most/20 || got < tt.most/2 {
			t.Errorf("%s: %v of work in 10 s, want about %v", tt.name, got, tt.most)
		}
	}
}

// What strangers do takes nothing from members, nor forged HELLOs from newcomers, nor
// one newcomer from another.
func TestNobodyTakesFromAnother(t *testing.T) {
	b := New(nil)
	at := int64(time.Hour)
	drain := func(s Sender) {
		for range 1_000_000 {
			if _, ok := b.Take(at, s, Signature, 1); !ok {
				return
			}
		}
		t.Fatalf("%v is not bounded", s)
	}
	drain(Sender{})
	drain(Sender{Address: 7})
	for _, s := range []Sender{{Address: 8}, {Address: 7, Member: true}, {Address: 9, Member: true}} {
		if _, ok := b.Take(at, s, Signature, 1); !ok {
			t.Errorf("%v has no time left", s)
		}
	}
	drain(Sender{Address: 7, Member: true})
	if _, ok := b.Take(at+int64(time.Second), Sender{Address: 7}, Signature, 1); !ok {
		t.Error("nothing after a second")
	}
}

// A goroutine that waits for a processor does not use up the budget.
func TestWaiting(t *testing.T) {
	var now time.Duration
	b := New(func() time.Duration { return now })
	w, _ := b.Take(int64(time.Hour), Sender{Address: 1}, Signature, 1)
	now += time.Minute
	w.Done()
	if _, ok := b.Take(int64(time.Hour), Sender{Address: 1}, Signature, 1); !ok {
		t.Error("a minute of waiting was charged")
	}
	Work{}.Done() // counts nothing
}

func BenchmarkTake(b *testing.B) {
	start := time.Now()
	x := New(func() time.Duration { return time.Since(start) })
	b.ReportAllocs()
	for i := range b.N {
		w, _ := x.Take(int64(i)*int64(time.Millisecond), Sender{Address: 1, Member: true}, Signature, 1)
		w.Done()
	}
}
