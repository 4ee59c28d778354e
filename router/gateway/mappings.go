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
	"ztgate/netstack"
)

const (
	mappingsFile = "nat-mappings.json"
	// maxMappingsFile is more than the largest flow table fills.
	maxMappingsFile = 64 << 20
)

// loadMappings reads what saveMappings left. Without it connections only lose
// their ports, so problems are logged and no more.
func loadMappings(home string, log *slog.Logger) []netstack.Mapping {
	list, err := readMappings(filepath.Join(home, mappingsFile))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		log.Warn("mappings of the last run are not used", "error", err)
	}
	return list
}

func readMappings(path string) (list []netstack.Mapping, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	if fi, err := f.Stat(); err != nil || fi.Size() > maxMappingsFile {
		return nil, cmp.Or(err, fmt.Errorf("%s: more than %d bytes", path, maxMappingsFile))
	}
	dec := json.NewDecoder(f)
	for {
		var m netstack.Mapping
		switch err := dec.Decode(&m); {
		case errors.Is(err, io.EOF):
			return list, nil
		case err != nil:
			return nil, fmt.Errorf("%s: %w", path, err) // not the part that was read
		}
		list = append(list, m)
	}
}

// saveMappings keeps the plane's mappings for the next run, one JSON object a line.
func saveMappings(home string, list []netstack.Mapping) error {
	return atomicfile.Stream(filepath.Join(home, mappingsFile), 0o600, func(f io.Writer) error {
		w := bufio.NewWriterSize(f, 64<<10) // a full table is 15 MB of text: it isn't held in memory
		enc := json.NewEncoder(w)
		for _, m := range list {
			if err := enc.Encode(m); err != nil {
				return err
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
)

// keepMappings saves the mappings from time to time if they have changed, until
// ctx ends.
func keepMappings(ctx context.Context, home string, mappings func() []netstack.Mapping, log *slog.Logger) {
	seed := maphash.MakeSeed()
	saved := sumMappings(seed, nil)
	t := time.NewTimer(keepEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		start, wait := time.Now(), keepEvery
		list := mappings()
		if sum := sumMappings(seed, list); sum != saved {
			if err := saveMappings(home, list); err != nil {
				log.Warn("save mappings", "error", err)
				wait = keepRetry
			} else {
				saved = sum
			}
		}
		t.Reset(max(wait, keepShare*time.Since(start)))
	}
}

func sumMappings(seed maphash.Seed, list []netstack.Mapping) uint64 {
	var h maphash.Hash
	h.SetSeed(seed)
	for _, m := range list {
		maphash.WriteComparable(&h, m)
	}
	return h.Sum64()
}
