package control

// Reloaded says what a reload did.
type Reloaded struct {
	Schema  int      `json:"schema"`
	Changed []string `json:"changed"` // keys in force now
	Restart []string `json:"restart"` // keys that wait for a restart
}
