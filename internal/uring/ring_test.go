package uring

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func newRing(t *testing.T) *Ring {
	t.Helper()
	r, err := New()
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func pipe(t *testing.T) (*os.File, int) {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	r := os.NewFile(uintptr(p[0]), "pipe")
	t.Cleanup(func() { _ = r.Close(); _ = unix.Close(p[1]) })
	return r, p[1]
}

// vectors cuts text into two parts.
func vectors(text string) []unix.Iovec {
	b := []byte(text)
	iov := make([]unix.Iovec, 2)
	for i, p := range [][]byte{b[:len(b)/2], b[len(b)/2:]} {
		iov[i].Base = &p[0]
		iov[i].SetLen(len(p))
	}
	return iov
}

// TestOrder fills the ring again and again, so that its positions wrap around.
func TestOrder(t *testing.T) {
	r := newRing(t)
	from, to := pipe(t)
	var want bytes.Buffer
	for round, n := range []int{1, Entries, 3, Entries, Entries - 1, 100, 0, 7} {
		want.Reset()
		for i := range n {
			text := fmt.Sprintf("write %d of round %d\n", i, round)
			want.WriteString(text)
			r.Writev(uintptr(to), vectors(text))
		}
		results, err := r.Submit()
		if err != nil || len(results) != n {
			t.Fatalf("round %d: %d results, %v", round, len(results), err)
		}
		got := make([]byte, want.Len())
		if _, err := io.ReadFull(from, got); err != nil || !bytes.Equal(got, want.Bytes()) {
			t.Fatalf("round %d: %v, got %q", round, err, got)
		}
		sum := 0
		for _, n := range results {
			sum += int(n)
		}
		if sum != len(got) {
			t.Errorf("round %d: %d bytes by the results, %d were read", round, sum, len(got))
		}
	}
}

// TestErrors: a write that fails, or ends early, says so and keeps no other from its
// turn.
func TestErrors(t *testing.T) {
	r := newRing(t)
	from, to := pipe(t)
	if _, err := unix.FcntlInt(uintptr(to), unix.F_SETPIPE_SZ, 4096); err != nil {
		t.Fatal(err)
	}
	closed, _ := pipe(t)
	r.Writev(uintptr(to), vectors("first"))
	r.Writev(closed.Fd(), vectors("reader")) // its reading end
	r.Writev(1<<30, vectors("nobody"))
	r.Writev(uintptr(to), vectors(string(make([]byte, 5000))))
	r.Writev(uintptr(to), vectors(string(make([]byte, 4096))))
	results, err := r.Submit()
	if err != nil {
		t.Fatal(err)
	}
	if len(results) != 5 || results[0] != 5 || results[1] != -int32(unix.EBADF) || results[2] != -int32(unix.EBADF) ||
		results[3] <= 0 || results[3] >= 5000 || results[4] != -int32(unix.EAGAIN) {
		t.Errorf("results %v", results)
	}
	got := make([]byte, 5)
	if _, err := io.ReadFull(from, got); err != nil || string(got) != "first" {
		t.Errorf("read %q, %v", got, err)
	}
}

// TestRefused: what the kernel doesn't take isn't written later.
func TestRefused(t *testing.T) {
	r := newRing(t)
	from, to := pipe(t)
	fd := r.fd
	r.Writev(uintptr(to), vectors("lost"))
	r.fd = -1
	results, err := r.Submit()
	r.fd = fd
	if len(results) != 0 || !errors.Is(err, unix.EBADF) {
		t.Fatalf("results %v, %v", results, err)
	}
	r.Writev(uintptr(to), vectors("kept"))
	if results, err := r.Submit(); err != nil || len(results) != 1 || results[0] != 4 {
		t.Fatalf("results %v, %v", results, err)
	}
	got := make([]byte, 8)
	if n, err := from.Read(got); err != nil || string(got[:n]) != "kept" {
		t.Errorf("read %q, %v", got[:n], err)
	}
}

func TestAllocations(t *testing.T) {
	r := newRing(t)
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	fd, iov := null.Fd(), vectors("nothing")
	if n := testing.AllocsPerRun(100, func() {
		for range 32 {
			r.Writev(fd, iov)
		}
		if results, err := r.Submit(); err != nil || results[31] != 7 {
			t.Errorf("results %v, %v", results, err)
		}
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
