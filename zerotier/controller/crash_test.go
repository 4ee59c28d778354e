package controller

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl2"
)

const crashDir = "ZTGATE_TEST_CRASH_DIR"

// TestMain is also the process that TestKill kills.
func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		crashWriter(dir)
		return
	}
	os.Exit(m.Run())
}

// crashWriter changes records for ever and says on standard output what is done.
func crashWriter(dir string) {
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, "identity"))
	fail(err)
	id, err := identity.Parse(string(text))
	fail(err)
	issued := int64(0)
	c, err := New(Config{Identity: id, Dir: filepath.Join(dir, "controller.d"), Send: func(_ identity.Address, v packet.Verb, b []byte, _ bool) {
		if v == packet.VerbOK {
			if ch, err := vl2.ParseChunk(b[9:]); err == nil {
				if cfg, err := vl2.DecodeNetworkConfig(ch.Data); err == nil {
					issued = cfg.Timestamp
				}
			}
		}
	}})
	fail(err)
	for i := 0; ; i++ {
		rec := DefaultNetwork()
		rec.Name = fmt.Sprint("n", i)
		rec.V4AssignMode.ZT = true
		rec.Routes = []Route{{Target: netip.MustParsePrefix("10.1.0.0/16")}}
		rec.IPAssignmentPools = []Pool{{netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("10.1.0.200")}}
		n, err := c.CreateNetwork(rec)
		fail(err)
		fmt.Println("net", n.ID, i)
		for j := range 3 {
			a := id.Address()
			if j > 0 {
				a = identity.Address(0x1000000000 + j)
			}
			m, err := c.UpdateMember(n.ID, a, func(m *Member) error { m.Authorized, m.Name = true, fmt.Sprint(j); return nil })
			fail(err)
			fmt.Println("member", n.ID, m.Address, m.Revision, m.Authorized)
		}
		time.Sleep(time.Microsecond)
		c.HandleRequest(id, 7, n.ID, vl2.RequestMetadata())
		c.Work(time.Now())
		m, _ := c.Member(n.ID, id.Address())
		if len(m.IPAssignments) != 1 {
			fail(fmt.Errorf("no address: %+v", m))
		}
		fmt.Println("issued", n.ID, issued, m.IPAssignments[0])
		m, err = c.UpdateMember(n.ID, id.Address(), func(m *Member) error { m.Authorized = false; return nil })
		fail(err)
		fmt.Println("member", n.ID, m.Address, m.Revision, m.Authorized)
		if i%3 == 2 {
			fail(c.DeleteNetwork(n.ID))
			fmt.Println("gone", n.ID)
		}
	}
}

// TestKill kills a controller in the midst of its work, again and again, and starts
// another on what it left: everything that was reported as done is there, nothing is
// half there, and no time stamp and no address is given twice.
func TestKill(t *testing.T) {
	_, ids := nodes(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "identity"), []byte(ids["ctrl"].SecretString()), 0o600); err != nil {
		t.Fatal(err)
	}
	type state struct {
		revision   uint64
		authorized bool
	}
	networks, members := map[string]int{}, map[string]state{}
	issued, addrs := map[string]int64{}, map[string]string{}
	for round := range 6 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), crashDir+"="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		done := 0
		for stop := 7 + 5*round; lines.Scan(); {
			if done++; done == stop {
				// The writer is somewhere in the next step; what it still says counts.
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
			f := strings.Fields(lines.Text())
			switch f[0] {
			case "net":
				var i int
				fmt.Sscan(f[2], &i)
				networks[f[1]] = i
			case "member":
				var rev uint64
				fmt.Sscan(f[3], &rev)
				members[f[1]+" "+f[2]] = state{rev, f[4] == "true"}
			case "issued":
				var ts int64
				fmt.Sscan(f[2], &ts)
				issued[f[1]], addrs[f[1]] = ts, f[3]
			case "gone":
				delete(networks, f[1])
			}
		}
		if err := cmd.Wait(); err == nil || done < 7 {
			t.Fatalf("the writer ended by itself after %d steps", done)
		}
		c, err := New(Config{Identity: ids["ctrl"], Dir: filepath.Join(dir, "controller.d"), Send: func(identity.Address, packet.Verb, []byte, bool) {}})
		if err != nil {
			t.Fatal(err)
		}
		if len(c.broken) != 0 {
			t.Fatalf("round %d: unreadable networks %v", round, c.broken)
		}
		for id := range networks {
			nid, err := vl2.ParseNetworkID(id)
			if err != nil {
				t.Fatal(err)
			}
			n := c.networks[nid]
			if n == nil {
				// The writer deletes every third network, and may not have come to report it.
				if networks[id]%3 != 2 {
					t.Errorf("round %d: network %s is lost", round, id)
				}
				delete(networks, id)
				continue
			}
			if len(n.broken) != 0 {
				t.Errorf("round %d: unreadable members %v", round, n.broken)
			}
			if ts, err := c.timestamp(n, time.UnixMilli(0)); err != nil || ts <= issued[id] {
				t.Errorf("round %d: time stamp %d again after %d, %v", round, ts, issued[id], err)
			}
			for key, want := range members {
				if !strings.HasPrefix(key, id) {
					continue
				}
				a, err := identity.ParseAddress(strings.Fields(key)[1])
				if err != nil {
					t.Fatal(err)
				}
				m := n.members[a]
				if m == nil || m.rec.Revision < want.revision || m.rec.Revision == want.revision && m.rec.Authorized != want.authorized {
					t.Errorf("round %d: member %s: %+v, want %+v", round, key, m, want)
				} else if ip := addrs[id]; a == ids["ctrl"].Address() && ip != "" && fmt.Sprint(m.rec.IPAssignments) != "["+ip+"]" {
					t.Errorf("round %d: member %s lost its address %s: %v", round, key, ip, m.rec.IPAssignments)
				}
				if m != nil && a == ids["ctrl"].Address() && m.rec.LastDeauthorizedTime != 0 && len(n.revocations) == 0 {
					t.Errorf("round %d: the revocation of %s is lost", round, key)
				}
			}
		}
		files, err := filepath.Glob(filepath.Join(dir, "controller.d", "network", "*.json"))
		if err != nil || len(files) != len(c.networks) {
			t.Errorf("round %d: %d files for %d networks, %v", round, len(files), len(c.networks), err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil || !json.Valid(b) {
				t.Errorf("%s: %v, %q", f, err, b)
			}
		}
	}
}
