//go:build !linux

package clock

import "time"

// Read looks at the clocks. Where sleep can't be told, the wall clock seems to go ahead.
func Read() Reading { return Reading{Now: time.Now()} }
