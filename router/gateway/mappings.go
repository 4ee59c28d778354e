package gateway

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"ztgate/internal/atomicfile"
	"ztgate/internal/disk"
	"ztgate/netstack"
)

const (
	mappingsFile = "nat-mappings.json"
	// maxMappingsFile is more than the largest flow table fills.
	maxMappingsFile = 64 << 20
)

// mappingFile keeps the plane's mappings for the next run, one JSON object a line.
type mappingFile struct {
	disk disk.FS
	path string
}

func newMappingFile(on disk.FS, home string) mappingFile {
	return mappingFile{disk.Or(on), filepath.Join(home, mappingsFile)}
}

// load reads what save left. Without it connections only lose their ports, so problems
// are logged and no more.
func (f mappingFile) load(log *slog.Logger) []netstack.Mapping {
	list, err := f.read()
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		log.Warn("mappings of the last run are not used", "error", err)
	}
	return list
}

func (f mappingFile) read() (list []netstack.Mapping, err error) {
	r, err := f.disk.Open(f.path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = r.Close() }()
	if fi, err := r.Stat(); err != nil || fi.Size() > maxMappingsFile {
		return nil, cmp.Or(err, fmt.Errorf("%s: more than %d bytes", f.path, maxMappingsFile))
	}
	in := bufio.NewReader(r)
	dec := json.NewDecoder(in)
	// Versions before wrote one array.
	if first, err := in.Peek(1); err == nil && first[0] == '[' {
		if err := dec.Decode(&list); err != nil {
			return nil, fmt.Errorf("%s: %w", f.path, err)
		}
		return list, nil
	}
	for {
		var m netstack.Mapping
		switch err := dec.Decode(&m); {
		case errors.Is(err, io.EOF):
			return list, nil
		case err != nil:
			return nil, fmt.Errorf("%s: %w", f.path, err) // not the part that was read
		}
		list = append(list, m)
	}
}

// save replaces the file. It calls pause after every keepPiece mappings.
func (f mappingFile) save(list []netstack.Mapping, pause func()) error {
	return atomicfile.Stream(f.disk, f.path, 0o600, func(out io.Writer) error {
		w := bufio.NewWriterSize(out, 64<<10) // a full table is 15 MB of text: it isn't held in memory
		enc := json.NewEncoder(w)
		for i, m := range list {
			if err := enc.Encode(m); err != nil {
				return err
			}
			if i%keepPiece == keepPiece-1 {
				pause()
			}
		}
		return w.Flush()
	})
}

const (
	// keepEvery is how much a killed process may forget of its mappings.
	keepEvery = 5 * time.Second
	// keepShare bounds the time spent on large tables: 1 in keepShare.
	keepShare = 100
	// keepRetry is how often a failure is tried again, and logged.
	keepRetry = time.Minute
	// keepPiece is how many mappings are looked at or written in one go, which takes less
	// than a millisecond, and keepPause how long the processor is left to others then: the
	// TUN's queue has room for 500 packets.
	keepPiece = 512
	keepPause = 5 * time.Millisecond
)

// keeper saves mappings that have changed.
type keeper struct {
	file     mappingFile
	mappings func() []netstack.Mapping
	log      *slog.Logger
	seed     maphash.Seed
	saved    uint64
	pause    func() // between pieces
}

func newKeeper(f mappingFile, mappings func() []netstack.Mapping, log *slog.Logger) *keeper {
	seed := maphash.MakeSeed()
	return &keeper{f, mappings, log, seed, sumMappings(seed, nil, noPause), noPause}
}

func noPause() {}

// run saves the mappings from time to time until ctx ends.
func (k *keeper) run(ctx context.Context) {
	var paused time.Duration
	k.pause = func() {
		start := time.Now()
		select {
		case <-ctx.Done(): // then it hurries
		case <-time.After(keepPause):
		}
		paused += time.Since(start)
	}
	t := time.NewTimer(keepEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		start := time.Now()
		paused = 0
		wait := k.keep()
		t.Reset(max(wait, keepShare*(time.Since(start)-paused)))
	}
}

// keep saves the mappings, and returns when to do so again.
func (k *keeper) keep() time.Duration {
	list := k.mappings()
	sum := sumMappings(k.seed, list, k.pause)
	if sum == k.saved {
		return keepEvery
	}
	if err := k.file.save(list, k.pause); err != nil {
		k.log.Warn("save mappings", "error", err)
		return keepRetry
	}
	k.saved = sum
	return keepEvery
}

func sumMappings(seed maphash.Seed, list []netstack.Mapping, pause func()) uint64 {
	var h maphash.Hash
	h.SetSeed(seed)
	for i, m := range list {
		maphash.WriteComparable(&h, m)
		if i%keepPiece == keepPiece-1 {
			pause()
		}
	}
	return h.Sum64()
}
