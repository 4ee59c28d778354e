package gateway

import (
	"bytes"
	"context"
	"hash/maphash"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"ztgate/netstack"
)

func TestMappings(t *testing.T) {
	home := t.TempDir()
	path := filepath.Join(home, mappingsFile)
	var logged bytes.Buffer
	log := slog.New(slog.NewTextHandler(&logged, nil))
	if got := newMappingFile(nil, home).load(log); got != nil || logged.Len() > 0 {
		t.Errorf("without a file: %v, log %q", got, &logged)
	}
	want := []netstack.Mapping{
		{Proto: 6, Client: netip.MustParseAddrPort("172.31.0.10:4000"), External: netip.MustParseAddrPort("10.147.17.5:4000")},
		{Proto: 17, Client: netip.MustParseAddrPort("[fd77:1::5]:4000"), External: netip.MustParseAddrPort("[fd77:100::1]:50000")},
	}
	if err := newMappingFile(nil, home).save(want, noPause); err != nil {
		t.Fatal(err)
	}
	if got := newMappingFile(nil, home).load(log); !slices.Equal(got, want) || logged.Len() > 0 {
		t.Errorf("read %v, want %v, log %q", got, want, &logged)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("file %v, %v, want mode 0600", fi, err)
	}
	whole, err := os.ReadFile(path)
	if err != nil || strings.Count(string(whole), "\n") != len(want) {
		t.Errorf("file %q, %v, want a line for each", whole, err)
	}
	array := "[" + strings.Replace(strings.TrimSpace(string(whole)), "\n", ",\n", 1) + "]"
	if err := os.WriteFile(path, []byte(array), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := newMappingFile(nil, home).load(log); !slices.Equal(got, want) || logged.Len() > 0 {
		t.Errorf("an array, as versions before wrote it: %v, log %q", got, &logged)
	}
	for _, damaged := range []string{"{", "[", `{"protocol":6,"client":"nobody"}`, `{"protocol":600}`, string(whole[:len(whole)-2]), string(whole) + "x"} {
		logged.Reset()
		if err := os.WriteFile(path, []byte(damaged), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := newMappingFile(nil, home).load(log); len(got) > 0 || !strings.Contains(logged.String(), mappingsFile) {
			t.Errorf("file %q: %v, log %q", damaged, got, &logged)
		}
	}
	logged.Reset()
	chunk := "{}" + strings.Repeat(" ", 1<<20)
	if err := os.WriteFile(path, []byte(strings.Repeat(chunk, maxMappingsFile>>20)), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := newMappingFile(nil, home).load(log); got != nil || !strings.Contains(logged.String(), "more than") {
		t.Errorf("a file too large: %d mappings, log %q", len(got), &logged)
	}
	if err := newMappingFile(nil, home).save(nil, noPause); err != nil {
		t.Fatal(err)
	}
	logged.Reset()
	if got := newMappingFile(nil, home).load(log); len(got) > 0 || logged.Len() > 0 {
		t.Errorf("no mappings are read as %v, log %q", got, &logged)
	}
	if err := newMappingFile(nil, filepath.Join(home, "none")).save(want, noPause); err == nil {
		t.Error("a failure to save isn't reported")
	}
}

// TestKeepMappings: the file follows the mappings, is left alone while they are
// the same, and a disk that is full is named once a minute.
func TestKeepMappings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		home := t.TempDir()
		path := filepath.Join(home, mappingsFile)
		var logged bytes.Buffer
		log := slog.New(slog.NewTextHandler(&logged, nil))
		var list atomic.Pointer[[]netstack.Mapping]
		list.Store(new([]netstack.Mapping))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			newKeeper(newMappingFile(nil, home), func() []netstack.Mapping { return *list.Load() }, log).run(ctx)
		}()
		pass := func(d time.Duration) {
			time.Sleep(d)
			synctest.Wait()
		}
		pass(3 * keepEvery)
		if _, err := os.Stat(path); err == nil {
			t.Error("a file without mappings was written")
		}
		one := netstack.Mapping{Proto: 6, Client: netip.MustParseAddrPort("172.31.0.10:4000"), External: netip.MustParseAddrPort("10.147.17.5:50000")}
		list.Store(&[]netstack.Mapping{one})
		pass(keepEvery)
		if got, err := newMappingFile(nil, home).read(); err != nil || !slices.Equal(got, []netstack.Mapping{one}) {
			t.Fatalf("kept %v, %v, want %v", got, err, one)
		}
		if err := os.Remove(path); err != nil { // to see whether it is written again
			t.Fatal(err)
		}
		pass(3 * keepEvery)
		if _, err := os.Stat(path); err == nil {
			t.Error("mappings that are the same were written again")
		}
		list.Store(&[]netstack.Mapping{one, one})
		pass(keepEvery)
		if got, err := newMappingFile(nil, home).read(); err != nil || len(got) != 2 {
			t.Errorf("kept %v, %v, want two", got, err)
		}
		if err := os.RemoveAll(home); err != nil {
			t.Fatal(err)
		}
		list.Store(new([]netstack.Mapping))
		pass(10 * time.Minute)
		if n := strings.Count(logged.String(), "save mappings"); n < 9 || n > 11 {
			t.Errorf("%d messages in 10 minutes: %s", n, &logged)
		}
		cancel()
		<-done
	})
}

// TestKeepInPieces: many mappings are saved piece by piece, with pauses in which others
// have the processor, unless the gateway ends.
func TestKeepInPieces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		list := make([]netstack.Mapping, 20*keepPiece)
		for i := range list {
			a := netip.AddrPortFrom(netip.MustParseAddr("172.31.0.10"), uint16(1024+i))
			list[i] = netstack.Mapping{Proto: 6, Client: a, External: a}
		}
		const pieces = 2 * 20 // it looks for changes, then writes
		for _, ends := range []bool{false, true} {
			f := newMappingFile(nil, t.TempDir())
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() {
				defer close(done)
				newKeeper(f, func() []netstack.Mapping { return list }, slog.New(slog.DiscardHandler)).run(ctx)
			}()
			time.Sleep(keepEvery + keepPause*pieces - time.Nanosecond)
			synctest.Wait()
			if _, err := os.Stat(f.path); err == nil {
				t.Errorf("%d mappings are written with less than %d pauses", len(list), pieces)
			}
			if !ends {
				time.Sleep(keepPause)
			}
			cancel()
			<-done
			if got, err := f.read(); err != nil || !slices.Equal(got, list) {
				t.Errorf("kept %d mappings of %d, %v", len(got), len(list), err)
			}
		}
	})
}

// BenchmarkKeepMappings is the largest table of one overlay address: all ports of
// TCP, UDP and ICMP.
func BenchmarkKeepMappings(b *testing.B) {
	var list []netstack.Mapping
	for _, proto := range []uint8{6, 17, 1} {
		for port := 1; port < 61000; port++ {
			list = append(list, netstack.Mapping{Proto: proto,
				Client:   netip.AddrPortFrom(netip.AddrFrom4([4]byte{172, 31, byte(port >> 12), 10}), uint16(port)),
				External: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 147, 17, 5}), uint16(port))})
		}
	}
	home, seed := b.TempDir(), maphash.MakeSeed()
	b.Run("sum", func(b *testing.B) {
		for b.Loop() {
			sumMappings(seed, list, noPause)
		}
	})
	b.Run("save", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := newMappingFile(nil, home).save(list, noPause); err != nil {
				b.Fatal(err)
			}
		}
	})
}
