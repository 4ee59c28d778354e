// Package labtest is what tests in labs have in common: the end of a lab, scripts, and
// the ends of connections.
package labtest

import (
	"context"
	"os"
	"testing"
	"time"

	"ztgate/router/lab"
)

// End removes a lab when the test ends. If the test failed, it shows the last lines of
// every process first.
func End(t testing.TB, top *lab.Topology) {
	t.Cleanup(func() {
		if t.Failed() {
			for _, p := range top.Processes() {
				t.Log("\n" + p.Tail(30))
			}
		}
		if err := top.Close(); err != nil {
			t.Error(err)
		}
		_ = os.RemoveAll(top.LogDir)
	})
}

// Must ends the test if err isn't nil.
func Must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Shell runs a script in a namespace and returns its standard output. A script that
// fails ends the test.
func Shell(t testing.TB, n *lab.Namespace, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	out, err := n.Run(ctx, "sh", "-ec", script)
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}
