//go:build e2e

package attack

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// group is a control group that has all processes of the gateway, and bounds their memory.
type group struct {
	dir               string
	limit, most, ooms string // files
}

// newGroup makes a control group, by what the machine has: version 1 or 2.
func newGroup(limit string) (*group, error) {
	g := &group{"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		g = &group{"/sys/fs/cgroup", "memory.max", "memory.peak", "memory.events"}
	}
	var err error
	if g.dir, err = os.MkdirTemp(g.dir, labName); err != nil {
		return nil, fmt.Errorf("memory can't be bounded here: %w", err)
	}
	if err := os.WriteFile(filepath.Join(g.dir, g.limit), []byte(limit), 0); err != nil {
		return nil, errors.Join(fmt.Errorf("memory can't be bounded here: %w", err), os.Remove(g.dir))
	}
	return g, nil
}

// close removes the group, which must be empty, and says how much memory was taken. That
// the kernel killed a process of it is an error.
func (g *group) close() (string, error) {
	most, err := os.ReadFile(filepath.Join(g.dir, g.most))
	if err != nil {
		return "", err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(most)), 10, 64)
	if err != nil {
		return "", err
	}
	events, err := os.ReadFile(filepath.Join(g.dir, g.ooms))
	if err != nil {
		return "", err
	}
	kills := "0"
	for line := range strings.Lines(string(events)) {
		if count, ok := strings.CutPrefix(strings.TrimSpace(line), "oom_kill "); ok {
			kills = count
		}
	}
	if kills != "0" {
		err = fmt.Errorf("the kernel killed %s processes of the gateway for want of memory", kills)
	}
	return fmt.Sprintf("at most %d MiB of memory were taken", n>>20), errors.Join(err, os.Remove(g.dir))
}
