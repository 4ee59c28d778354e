package gateway

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"ztgate/internal/atomicfile"
)

// Mapping is an external port of the gateway and the client endpoint whose it is.
type Mapping struct {
	Protocol uint8          `json:"protocol"`
	Client   netip.AddrPort `json:"client"`
	External netip.AddrPort `json:"external"`
}

const (
	mappingsFile = "nat-mappings.json"
	// maxMappingsFile is more than the largest flow table fills.
	maxMappingsFile = 64 << 20
)

// loadMappings reads what saveMappings left. Without it connections only lose
// their ports, so problems are logged and no more.
func loadMappings(home string, log *slog.Logger) []Mapping {
	list, err := readMappings(filepath.Join(home, mappingsFile))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		log.Warn("mappings of the last run are not used", "error", err)
	}
	return list
}

func readMappings(path string) (list []Mapping, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxMappingsFile+1))
	switch {
	case err != nil:
		return nil, err
	case len(b) > maxMappingsFile:
		return nil, fmt.Errorf("%s: more than %d bytes", path, maxMappingsFile)
	}
	if err := json.Unmarshal(b, &list); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err) // not the part that was read
	}
	return list, nil
}

// saveMappings keeps the plane's mappings for the next run.
func saveMappings(home string, list []Mapping) error {
	return atomicfile.Stream(filepath.Join(home, mappingsFile), 0o600, func(f io.Writer) error {
		w := bufio.NewWriterSize(f, 64<<10) // a full table is 15 MB of text: it isn't held in memory
		line := make([]byte, 0, 256)
		for i, m := range list {
			begin := ",\n"
			if i == 0 {
				begin = "["
			}
			line = append(line[:0], begin...)
			line = append(line, `{"protocol":`...)
			line = strconv.AppendUint(line, uint64(m.Protocol), 10)
			line = append(line, `,"client":"`...)
			line = m.Client.AppendTo(line) // zones, which would need quoting, are refused by the plane
			line = append(line, `","external":"`...)
			line = append(m.External.AppendTo(line), `"}`...)
			_, _ = w.Write(line) // Flush returns the error
		}
		if len(list) == 0 {
			_ = w.WriteByte('[')
		}
		_ = w.WriteByte(']')
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
func keepMappings(ctx context.Context, home string, mappings func() []Mapping, log *slog.Logger) {
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

func sumMappings(seed maphash.Seed, list []Mapping) uint64 {
	var h maphash.Hash
	h.SetSeed(seed)
	for _, m := range list {
		maphash.WriteComparable(&h, m)
	}
	return h.Sum64()
}
