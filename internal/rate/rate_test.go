package rate

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"
)

// step is an attempt at a time.
type step struct {
	at   time.Duration
	n    int
	want bool
}

var sequences = []struct {
	name  string
	every time.Duration
	burst int
	steps []step
}{
	{"one at a time", time.Second, 1, []step{
		{0, 1, true}, {0, 1, false}, {time.Second - 1, 1, false}, {time.Second, 1, true}, {time.Second, 1, false},
	}},
	{"a burst, then the rate", time.Second, 3, []step{
		{0, 1, true}, {0, 1, true}, {0, 1, true}, {0, 1, false},
		{time.Second, 1, true}, {time.Second, 1, false}, {3 * time.Second, 1, true}, {3 * time.Second, 1, true}, {3 * time.Second, 1, false},
	}},
	{"no more than the burst is saved", time.Second, 2, []step{
		{0, 1, true}, {time.Hour, 1, true}, {time.Hour, 1, true}, {time.Hour, 1, false},
	}},
	{"what is refused costs nothing", time.Second, 1, []step{
		{0, 1, true}, {time.Second / 2, 1, false}, {time.Second / 2, 1, false}, {time.Second, 1, true},
	}},
	{"several at once", 10, 100, []step{
		{0, 60, true}, {0, 60, false}, {0, 40, true}, {100, 10, true}, {100, 1, false}, {1100, 101, false}, {1100, 100, true},
	}},
	{"a worker with an older time", time.Second, 2, []step{
		{10 * time.Second, 1, true}, {9 * time.Second, 1, false}, {10 * time.Second, 1, true}, {10 * time.Second, 1, false},
	}},
	{"nothing at all", time.Second, 0, []step{{0, 1, false}, {time.Hour, 1, false}}},
}

const start = int64(time.Hour)

func TestShared(t *testing.T) {
	for _, tt := range sequences {
		t.Run(tt.name, func(t *testing.T) {
			var b Shared
			for i, s := range tt.steps {
				if got := b.Take(start+int64(s.at), s.n, tt.every, tt.burst); got != s.want {
					t.Errorf("step %d: %d at %v: %v, want %v", i, s.n, s.at, got, s.want)
				}
			}
		})
	}
}

func TestBucketAndMap(t *testing.T) {
	if size := unsafe.Sizeof(Bucket{}); size != 8 {
		t.Errorf("a bucket is %d bytes", size)
	}
	for _, tt := range sequences {
		if tt.steps[0].n != 1 {
			continue
		}
		t.Run(tt.name, func(t *testing.T) {
			var b Bucket
			m := Map[int]{Every: tt.every, Burst: tt.burst, Max: 1}
			base := time.Unix(1, 0)
			for i, s := range tt.steps {
				if got := b.Take(start+int64(s.at), tt.every, tt.burst); got != s.want {
					t.Errorf("step %d at %v: %v of the bucket, want %v", i, s.at, got, s.want)
				}
				if got := m.Take(7, base.Add(s.at)); got != s.want {
					t.Errorf("step %d at %v: %v of the map, want %v", i, s.at, got, s.want)
				}
			}
		})
	}
}

func TestPut(t *testing.T) {
	var b Shared
	if !b.Take(start, 3, time.Second, 3) || b.Take(start, 1, time.Second, 3) {
		t.Fatal("not three tokens")
	}
	b.Put(2, time.Second)
	if !b.Take(start, 2, time.Second, 3) || b.Take(start, 1, time.Second, 3) {
		t.Error("two that were put back are not two")
	}
	m := Map[string]{Every: time.Second, Burst: 1, Max: 2}
	now := time.Unix(1, 0)
	m.Put("stranger")
	if !m.Take("a", now) || m.Take("a", now) {
		t.Fatal("not one token")
	}
	if m.Put("a"); !m.Take("a", now) || m.Take("a", now) {
		t.Error("one that was put back is not one")
	}
}

func TestMapIsBounded(t *testing.T) {
	m := Map[int]{Every: time.Second, Burst: 1, Max: 2}
	now := time.Unix(1, 0)
	for i, want := range []bool{true, true, false, false} {
		if got := m.Take(i, now); got != want {
			t.Errorf("source %d: %v, want %v", i, got, want)
		}
	}
	now = now.Add(time.Second)
	if !m.Take(3, now) {
		t.Error("those that are idle keep their place")
	}
	if len(m.m) != 1 {
		t.Errorf("%d sources remembered, want 1", len(m.m))
	}
	if m.Expire(now.Add(time.Second)); len(m.m) != 0 {
		t.Errorf("%d sources remembered after all are idle", len(m.m))
	}
}

func TestTable(t *testing.T) {
	table := NewTable[int](1)
	if !table.Of(1).Take(start, 1, time.Second, 1) || table.Of(2).Take(start, 1, time.Second, 1) {
		t.Error("sources of one bucket do not share it")
	}
	wide := NewTable[int](4096)
	if !wide.Of(1).Take(start, 1, time.Second, 1) || wide.Of(1).Take(start, 1, time.Second, 1) {
		t.Error("a source does not keep its bucket")
	}
}

func TestSharedConcurrently(t *testing.T) {
	const burst, workers = 1000, 4
	var b Shared
	var got atomic.Int64
	var g sync.WaitGroup
	for range workers {
		g.Go(func() {
			for range burst {
				if b.Take(start, 1, time.Second, burst) {
					got.Add(1)
				}
			}
		})
	}
	g.Wait()
	if got.Load() != burst {
		t.Errorf("%d tokens taken, want %d", got.Load(), burst)
	}
}

func BenchmarkBucket(b *testing.B) {
	b.ReportAllocs()
	var x Bucket
	now := start
	for b.Loop() {
		now += 1000
		x.Take(now, time.Microsecond, 10)
	}
}

func BenchmarkTable(b *testing.B) {
	b.ReportAllocs()
	x := NewTable[uint64](4096)
	now := start
	for b.Loop() {
		now += 1000
		x.Of(uint64(now)).Take(now, 1, time.Microsecond, 10)
	}
}

func BenchmarkMap(b *testing.B) {
	b.ReportAllocs()
	x := Map[uint64]{Every: time.Microsecond, Burst: 10, Max: 100}
	now := time.Unix(1, 0)
	for b.Loop() {
		now = now.Add(time.Microsecond)
		x.Take(uint64(now.UnixNano()/1000%50), now)
	}
}

func TestNoAllocs(t *testing.T) {
	var b Bucket
	table := NewTable[uint64](64)
	m := Map[uint64]{Every: time.Second, Burst: 10, Max: 100}
	now := time.Unix(1, 0)
	m.Take(1, now)
	if n := testing.AllocsPerRun(100, func() {
		b.Take(start, time.Second, 10)
		table.Of(1).Take(start, 1, time.Second, 10)
		m.Take(1, now)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
