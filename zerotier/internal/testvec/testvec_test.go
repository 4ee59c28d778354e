package testvec

import (
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const root = "../.." // zerotier/

// What no test counts, with the reason.
var notCases = map[string]string{
	"identities":     "the nodes of the cases",
	"networks":       "the networks of the cases",
	"network_id":     "the network of the cases",
	"nodes":          "the nodes of the cases",
	"config":         "the configuration of the cases",
	"time":           "the time of the cases",
	"own_com":        "the certificate of the judging node",
	"counts":         "how many cases there are",
	"shared_keys":    "the keys of the packets",
	"roots":          "the roots of the worlds",
	"planet":         "the nodes of the packets start with it",
	"arp_network_id": "the network of ndp_emulation", "arp_node_address": "the node of ndp_emulation", "arp_node_mac": "the node of ndp_emulation",
	"delivered":         "what the scenes delivered: TestScenes of package network compares it, entry by entry",
	"linux_device_name": "names of zerotier-one's interfaces; ours are the operator's to choose",
}

// TestEveryVectorIsRead fails if some test vectors are compared with by no test.
// That those which count a list leave no case out is their own business: see [Tally].
func TestEveryVectorIsRead(t *testing.T) {
	counted := make(map[string]bool)
	call := regexp.MustCompile(`testvec\.Count\(t, "([^"]+)", "?([a-z0-9_]+)"?\)`)
	loop := regexp.MustCompile(`field := range \[\]string\{([^}]*)\}`)
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, m := range call.FindAllStringSubmatch(string(b), -1) {
			names := m[2]
			if names == "field" {
				names = loop.FindStringSubmatch(string(b))[1]
			}
			for name := range strings.SplitSeq(names, ",") {
				counted[m[1]+" "+strings.Trim(name, ` "`)] = true
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(root + "/testdata/vectors/*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no vectors: %v", err)
	}
	used := make(map[string]bool)
	for _, path := range files {
		var fields map[string]json.RawMessage
		Load(t, filepath.Base(path), &fields)
		for list := range fields {
			key := filepath.Base(path) + " " + list
			if _, ok := notCases[list]; ok {
				used[list] = true
			} else if list != "description" && !counted[key] {
				t.Errorf("no test counts the cases of %s", key)
			}
			delete(counted, key)
		}
	}
	for key := range counted {
		t.Errorf("%s is counted but isn't there", key)
	}
	for list := range notCases {
		if !used[list] {
			t.Errorf("no file has %q", list)
		}
	}
}

// A test that leaves a case out fails, unless it says why.
func TestTally(t *testing.T) {
	for _, tt := range []struct {
		judged, left int
		fails        bool
	}{{40, 0, false}, {39, 1, false}, {39, 0, true}, {41, 0, true}} {
		f := &fake{TB: t}
		n := Count(f, "mac.json", "cases")
		for range tt.judged {
			n.Judge()
		}
		for range tt.left {
			n.Leave("one", "of this test")
		}
		n.check()
		if f.failed != tt.fails {
			t.Errorf("%d judged, %d left out: failed %v", tt.judged, tt.left, f.failed)
		}
	}
}

// fake is a test that may fail.
type fake struct {
	testing.TB
	failed bool
}

func (f *fake) Cleanup(func())        {}
func (f *fake) Failed() bool          { return f.failed }
func (f *fake) Errorf(string, ...any) { f.failed = true }
func (f *fake) Logf(string, ...any)   {}
