package lab

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The whole scenario with the real program.
func TestScenario(t *testing.T) {
	needRoot(t)
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	binary := filepath.Join(t.TempDir(), "ztgate")
	if out, err := exec.Command("go", "build", "-o", binary, "ztgate/cmd/ztgate").CombinedOutput(); err != nil {
		t.Fatalf("build ztgate: %v\n%s", err, out)
	}
	prefix := testPrefix() + "s"
	r, err := Run(context.Background(), Options{Binary: binary, Prefix: prefix, Duration: time.Second, Progress: t.Output()})
	var text strings.Builder
	r.WriteText(&text)
	t.Log("\n" + text.String())
	if err != nil {
		t.Fatal(err)
	}
	expectNothing(t, prefix)
	if left, err := filepath.Glob(filepath.Join(os.TempDir(), prefix+"-logs-*")); err != nil || len(left) > 0 {
		t.Errorf("logs left behind: %v, %v", left, err)
	}
}
