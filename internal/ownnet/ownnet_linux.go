// Package ownnet runs tests in a network namespace of their own.
package ownnet

import (
	"os"
	"os/exec"
	"syscall"
	"testing"
)

const child = "ZTGATE_TEST_OWN_NET"

// Run calls f in a new network namespace: the test's program runs that one test again
// there. It skips the test without root.
func Run(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	if os.Getenv(child) == t.Name() {
		f(t)
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root for a network namespace")
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), child+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("in the namespace: %v\n%s", err, out)
	}
}
