package router

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"

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
func saveMappings(home string, list []Mapping, log *slog.Logger) {
	b, err := json.Marshal(list)
	if err == nil {
		err = atomicfile.Write(filepath.Join(home, mappingsFile), b, 0o600)
	}
	if err != nil {
		log.Warn("save mappings for the next run", "error", err)
	}
}
