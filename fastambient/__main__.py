from fastambient.cli import main

if __name__ == "__main__":
    main()
