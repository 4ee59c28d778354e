package router

import (
	"bytes"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestMappings(t *testing.T) {
	home := t.TempDir()
	path := filepath.Join(home, mappingsFile)
	var logged bytes.Buffer
	log := slog.New(slog.NewTextHandler(&logged, nil))
	if got := loadMappings(home, log); got != nil || logged.Len() > 0 {
		t.Errorf("without a file: %v, log %q", got, &logged)
	}
	want := []Mapping{
		{6, netip.MustParseAddrPort("172.31.0.10:4000"), netip.MustParseAddrPort("10.147.17.5:4000")},
		{17, netip.MustParseAddrPort("[fd77:1::5]:4000"), netip.MustParseAddrPort("[fd77:100::1]:50000")},
	}
	saveMappings(home, want, log)
	if got := loadMappings(home, log); !slices.Equal(got, want) || logged.Len() > 0 {
		t.Errorf("read %v, want %v, log %q", got, want, &logged)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("file %v, %v, want mode 0600", fi, err)
	}
	for _, damaged := range []string{"", "[{", `[{"protocol":6,"client":"nobody"}]`, `{"protocol":6}`} {
		logged.Reset()
		if err := os.WriteFile(path, []byte(damaged), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := loadMappings(home, log); len(got) > 0 || !strings.Contains(logged.String(), mappingsFile) {
			t.Errorf("file %q: %v, log %q", damaged, got, &logged)
		}
	}
	logged.Reset()
	if err := os.Truncate(path, maxMappingsFile+1); err != nil {
		t.Fatal(err)
	}
	if got := loadMappings(home, log); got != nil || !strings.Contains(logged.String(), "more than") {
		t.Errorf("a file too large: %d mappings, log %q", len(got), &logged)
	}
	logged.Reset()
	saveMappings(filepath.Join(home, "none"), want, log)
	if logged.Len() == 0 {
		t.Error("a failure to save isn't logged")
	}
}
