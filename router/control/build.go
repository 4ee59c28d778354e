package control

import (
	"runtime"
	"runtime/debug"

	"ztgate/router/config"
)

// Version is set by the linker; see the Makefile.
var Version = "unknown"

// Build describes this program.
type Build struct {
	Schema    int      `json:"schema"`
	Version   string   `json:"version"`
	Revision  string   `json:"revision"`
	GoVersion string   `json:"goVersion"`
	Node      string   `json:"node"`  // in use, or the default
	Nodes     []string `json:"nodes"` // makes in this program
	Platform  string   `json:"platform"`
}

// BuildInfo returns what is known about this program.
func BuildInfo() Build {
	b := Build{Schema: Schema, Version: Version, Revision: "unknown", GoVersion: runtime.Version(),
		Node: config.DefaultNode(), Nodes: config.NodeImplementations(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	dirty := false
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			b.Revision = s.Value
		case "vcs.modified":
			dirty = s.Value == "true"
		}
	}
	if dirty {
		b.Revision += "-dirty"
	}
	return b
}
